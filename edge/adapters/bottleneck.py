"""Bottleneck adapters on the device: one core R a group, r by r, between a frozen A and a frozen B of the server's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Self

import numpy as np

from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.errors import CheckpointError, RemoteProtocolError
from dlora.protocol.groups import GroupSpec, TargetSpec
from dlora.protocol.manifest import core_key
from dlora.protocol.tensors import FloatArray

from .core import Core, CoreGroup
from .kind import Parameter, SavedModule

_NOT_ORTHONORMAL: Final = 0.05  # rounding to fp16 costs some thousandths


class BottleneckGroup(CoreGroup):
    """``dW_j = scaling · s_j · B_j R A`` of every target module j of a group, with its gain s_j; ``adapter_state`` is
    A and the stacked B, which the server makes; R begins at zero. What goes to the server is ``R u`` (rows, r) of its
    ``u = A x`` (rows, r)."""

    def __init__(self, targets: Sequence[TargetSpec], core: Core, scaling: float) -> None:
        super().__init__(targets[0].name, {f"{targets[0].name}.core": core}, scaling)
        self.targets = tuple(targets)
        self.core = core

    @classmethod
    def create(cls, spec: AdapterSpec, group: GroupSpec, *, scaling: float, random: np.random.Generator) -> Self:
        core = Core(Parameter.of(np.zeros((spec.r, spec.r), np.float32)), core_key(None))
        return cls(group.targets, core, scaling)

    @staticmethod
    def draw_state(spec: AdapterSpec, group: GroupSpec, random: np.random.Generator) -> tuple[FloatArray, ...]:
        """A and B with orthonormal rows and columns."""
        lora_a = np.linalg.qr(random.standard_normal((group.in_features, spec.r)))[0].T
        lora_b = np.linalg.qr(random.standard_normal((group.out_features, spec.r)))[0]
        return np.ascontiguousarray(lora_a, np.float32), np.ascontiguousarray(lora_b, np.float32)

    def factors(self) -> list[SavedModule]:
        """``lora_A`` is A, ``lora_B`` is ``s_j · B_j R``, of each target module."""
        lora_a, stacked = self.adapter_state_values()
        ends = np.cumsum([target.out_features for target in self.targets])
        found = []
        for target, rows in zip(self.targets, np.split(stacked, ends[:-1]), strict=True):
            lora_b: FloatArray = rows * np.float32(target.gain)
            found.append(SavedModule(target.name, lora_a, lora_b @ self.core.parameter.value))
        return found

    def check_made_state(self, state: Sequence[FloatArray]) -> None:
        """A's rows and B's columns are orthonormal: with others, zeros say, nothing would be trained unnoticed."""
        for factor in (state[0], state[1].T):
            with np.errstate(over="ignore", invalid="ignore"):
                error = np.abs(factor @ factor.T - np.eye(len(factor), dtype=np.float32)).max()
            if not error <= _NOT_ORTHONORMAL:
                raise RemoteProtocolError(f"a basis for {self.name} that is not orthonormal")

    def load_factors(self, modules: Mapping[str, SavedModule], scaling: Mapping[str, float]) -> None:
        raise CheckpointError(
            "a bottleneck adapter starts only from one that a bottleneck run has saved: of another, the server would "
            "have to be sent B; start from this one with --kind lora"
        )
