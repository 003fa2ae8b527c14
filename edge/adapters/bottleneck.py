"""Bottleneck adapters on the device: one core R a group, r by r, between a frozen A and a frozen B of the server's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.errors import CheckpointError, RemoteProtocolError
from dlora.protocol.groups import GroupSpec, TargetSpec
from dlora.protocol.manifest import core_key
from dlora.protocol.tensors import FloatArray

from .core import Core
from .kind import Factors, GroupAdapters, LoadGraph, Parameter

_NOT_ORTHONORMAL: Final = 0.05  # rounding to fp16 costs some thousandths


class BottleneckGroup(GroupAdapters):
    """``dW_j = scaling · s_j · B_j R A`` of every target module j of a group, with its gain s_j; ``adapter_state`` is
    A and the stacked B."""

    def __init__(self, targets: Sequence[TargetSpec], core: Core, scaling: float) -> None:
        super().__init__(targets[0].name)
        self.targets = tuple(targets)
        self.core = core
        self.scaling = scaling

    def parameters(self) -> dict[str, Parameter]:
        return {f"{self.name}.core": self.core.parameter}

    def load_graphs(self, load: LoadGraph) -> None:
        self.core.load_graphs(load)

    def forward(self, x: FloatArray, scale: float) -> tuple[list[FloatArray], None]:
        """``R u`` (rows, r) of the server's ``u = A x`` (rows, r)."""
        return [self.core.forward(x, self.scaling * scale)], None

    def input_grad(self, grads: Sequence[FloatArray], scale: float) -> tuple[FloatArray, None]:
        return self.core.input_grad(grads[0], self.scaling * scale), None

    def weight_grads(
        self, x: FloatArray, forward: Any, grads: Sequence[FloatArray], backward: Any, scale: float
    ) -> dict[str, FloatArray]:
        return {f"{self.name}.core": self.core.weight_grad(x, grads[0], self.scaling * scale)}

    def factors(self) -> list[Factors]:
        """``lora_A`` is A, ``lora_B`` is ``s_j · B_j R``, of each target module."""
        lora_a, lora_b = self.adapter_state_values()
        core = self.core.parameter.value
        return [
            Factors(target.name, lora_a, rows @ core, self.scaling)
            for target, rows in zip(self.targets, self._with_gains(lora_b), strict=True)
        ]

    def _with_gains(self, lora_b: FloatArray) -> list[FloatArray]:
        """``s_j · B_j`` of each target module, (out_features, r)."""
        ends = np.cumsum([target.out_features for target in self.targets])
        return [
            rows * np.float32(target.gain)
            for target, rows in zip(self.targets, np.split(lora_b, ends[:-1]), strict=True)
        ]

    def given_to_server(self) -> list[FloatArray]:
        return [self.core.parameter.value * np.float32(self.scaling)]

    def check_made_state(self, state: Sequence[FloatArray]) -> None:
        """A's rows and B's columns are orthonormal: with others, zeros say, nothing would be trained unnoticed."""
        for factor in (state[0], state[1].T):
            with np.errstate(over="ignore", invalid="ignore"):
                error = np.abs(factor @ factor.T - np.eye(len(factor), dtype=np.float32)).max()
            if not error <= _NOT_ORTHONORMAL:
                raise RemoteProtocolError(f"a basis for {self.name} that is not orthonormal")

    def load_factors(self, factors: Mapping[str, Factors]) -> None:
        raise CheckpointError(
            "a bottleneck adapter starts only from one that a bottleneck run has saved: of another, the server would "
            "have to be sent B; start from this one with --kind lora"
        )


class Bottleneck:
    """Makes bottleneck adapters: R begins at zero, and the server makes A and B."""

    def create(
        self, spec: AdapterSpec, group: GroupSpec, *, scaling: float, random: np.random.Generator
    ) -> GroupAdapters:
        core = Core(Parameter.of(np.zeros((spec.r, spec.r), np.float32)), core_key(None))
        return BottleneckGroup(group.targets, core, scaling)

    def draw_state(self, spec: AdapterSpec, group: GroupSpec, random: np.random.Generator) -> tuple[FloatArray, ...]:
        """A and B with orthonormal rows and columns."""
        lora_a = np.linalg.qr(random.standard_normal((group.in_features, spec.r)))[0].T
        lora_b = np.linalg.qr(random.standard_normal((group.out_features, spec.r)))[0]
        return np.ascontiguousarray(lora_a, np.float32), np.ascontiguousarray(lora_b, np.float32)
