"""FFA-LoRA on the device: B of every target module; A is frozen, one a group, and applied by the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np

from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.errors import CheckpointError
from dlora.protocol.groups import GroupSpec
from dlora.protocol.manifest import core_key
from dlora.protocol.tensors import FloatArray

from .core import Core, CoreGroup
from .kind import Parameter, SavedModule


class FfaGroup(CoreGroup):
    """``delta_j = scaling · z B_jᵀ`` of every target module j, with the server's ``z = A x``; it is added times the
    module's gain. ``adapter_state`` is A, uniform in ±1/sqrt(in_features), as PEFT draws it; B begins at zero."""

    @classmethod
    def create(cls, spec: AdapterSpec, group: GroupSpec, *, scaling: float, random: np.random.Generator) -> Self:
        cores = {}
        for target in group.targets:
            lora_b = Parameter.of(np.zeros((target.out_features, spec.r), np.float32), target.gain)
            cores[f"{target.name}.lora_B"] = Core(lora_b, core_key(target.out_features))
        return cls(group.targets[0].name, cores, scaling)

    @staticmethod
    def draw_state(spec: AdapterSpec, group: GroupSpec, random: np.random.Generator) -> tuple[FloatArray, ...]:
        bound = group.in_features**-0.5
        return (random.uniform(-bound, bound, (spec.r, group.in_features)).astype(np.float32),)

    def factors(self) -> list[SavedModule]:
        (lora_a,) = self.adapter_state_values()
        return [
            SavedModule(name.removesuffix(".lora_B"), lora_a, core.parameter.with_gain)
            for name, core in self.cores.items()
        ]

    def load_factors(self, modules: Mapping[str, SavedModule], scaling: Mapping[str, float]) -> None:
        raise CheckpointError(
            "an ffa adapter starts only from one that an ffa run has saved: of another, the server would have to be "
            "sent A; start from this one with --kind lora"
        )
