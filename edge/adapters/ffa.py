"""FFA-LoRA on the device: B of every target module; A is frozen, one a group, and applied by the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.errors import CheckpointError
from dlora.protocol.groups import GroupSpec
from dlora.protocol.manifest import core_key
from dlora.protocol.tensors import FloatArray

from .core import Core
from .kind import Factors, GroupAdapters, LoadGraph, Parameter


class FfaGroup(GroupAdapters):
    """``delta_j = scaling · z B_jᵀ`` of every target module j, with the server's ``z = A x``; it is added times the
    module's gain. ``adapter_state`` is A.

    Args:
        cores: B of each target module, by the module's name.
    """

    def __init__(self, cores: Mapping[str, Core], scaling: float) -> None:
        super().__init__(next(iter(cores)))
        self.cores = dict(cores)
        self.scaling = scaling

    def parameters(self) -> dict[str, Parameter]:
        return {f"{name}.lora_B": core.parameter for name, core in self.cores.items()}

    def load_graphs(self, load: LoadGraph) -> None:
        for core in self.cores.values():
            core.load_graphs(load)

    def forward(self, x: FloatArray, scale: float) -> tuple[list[FloatArray], None]:
        return [core.forward(x, self.scaling * scale) for core in self.cores.values()], None

    def input_grad(self, grads: Sequence[FloatArray], scale: float) -> tuple[FloatArray, None]:
        """The gradient of z (rows, r), summed over target modules."""
        total: FloatArray | None = None
        for core, grad in zip(self.cores.values(), grads, strict=True):
            dz = core.input_grad(grad, self.scaling * scale)
            total = dz if total is None else total + dz
        assert total is not None
        return total, None

    def weight_grads(
        self, x: FloatArray, forward: Any, grads: Sequence[FloatArray], backward: Any, scale: float
    ) -> dict[str, FloatArray]:
        return {
            f"{name}.lora_B": core.weight_grad(x, grad, self.scaling * scale)
            for (name, core), grad in zip(self.cores.items(), grads, strict=True)
        }

    def given_to_server(self) -> list[FloatArray]:
        return [core.parameter.value * np.float32(self.scaling) for core in self.cores.values()]

    def factors(self) -> list[Factors]:
        (lora_a,) = self.adapter_state_values()
        return [Factors(name, lora_a, core.parameter.with_gain, self.scaling) for name, core in self.cores.items()]

    def load_factors(self, factors: Mapping[str, Factors]) -> None:
        raise CheckpointError(
            "an ffa adapter starts only from one that an ffa run has saved: of another, the server would have to be "
            "sent A; start from this one with --kind lora"
        )


class Ffa:
    """Makes FFA-LoRAs: A uniform in ±1/sqrt(in_features), as PEFT draws it, B zero."""

    def create(
        self, spec: AdapterSpec, group: GroupSpec, *, scaling: float, random: np.random.Generator
    ) -> GroupAdapters:
        return FfaGroup(
            {
                target.name: Core(
                    Parameter.of(np.zeros((target.out_features, spec.r), np.float32), target.gain),
                    core_key(target.out_features),
                )
                for target in group.targets
            },
            scaling,
        )

    def draw_state(self, spec: AdapterSpec, group: GroupSpec, random: np.random.Generator) -> tuple[FloatArray, ...]:
        bound = group.in_features**-0.5
        return (random.uniform(-bound, bound, (spec.r, group.in_features)).astype(np.float32),)
