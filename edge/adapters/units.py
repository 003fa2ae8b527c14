"""The device's adapters: LoRA weights, gradients and AdamW moments of every target module.

All of it stays here whatever kill-and-revive does: a killed unit keeps its weights, moments and step count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dlora.edge.seeds import Seed, adapter_generator
from dlora.protocol.choices import UnitKind
from dlora.protocol.groups import GroupSpec, group_units
from dlora.protocol.kill_revive import UnitState
from dlora.protocol.tensors import ByteArray, FloatArray


@dataclass
class Parameter:
    """A trainable matrix, its gradient of the step under way, and its AdamW moments; float32, one shape."""

    value: FloatArray
    exp_avg: FloatArray
    exp_avg_sq: FloatArray
    grad: FloatArray | None = None

    @classmethod
    def of(cls, value: FloatArray) -> Parameter:
        return cls(value, np.zeros_like(value), np.zeros_like(value))

    def add_grad(self, grad: FloatArray) -> None:
        self.grad = grad if self.grad is None else self.grad + grad


@dataclass
class Adapter:
    """The LoRA of one target module: ``delta = scaling * x A^T B^T``.

    Attributes:
        lora_A: (rank, in_features); lora_B: (out_features, rank), as PEFT has them.
    """

    name: str
    lora_A: Parameter
    lora_B: Parameter
    scaling: float

    @property
    def in_features(self) -> int:
        return int(self.lora_A.value.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.lora_B.value.shape[0])


@dataclass
class Unit:
    """What kill-and-revive switches.

    Attributes:
        adam_steps: how often its adapters were stepped, for AdamW's bias correction.
        fade_age: steps since it began to fade.
    """

    groups: tuple[int, ...]
    state: UnitState = UnitState.ACTIVE
    adam_steps: int = 0
    fade_age: int = 0


@dataclass
class AdapterSet:
    """All adapters, by exchange group and by unit.

    Attributes:
        groups: one tuple of adapters an exchange group, in the order of its target modules.
        kill_every: steps that fading takes.
    """

    groups: list[tuple[Adapter, ...]]
    units: list[Unit]
    kill_every: int
    _unit_of: dict[int, Unit] = field(init=False)

    def __post_init__(self) -> None:
        self._unit_of = {group: unit for unit in self.units for group in unit.groups}

    @classmethod
    def create(
        cls,
        groups: Sequence[GroupSpec],
        *,
        rank: int,
        scaling: float,
        seed: Seed,
        unit: UnitKind,
        kill_every: int,
    ) -> AdapterSet:
        """Fresh adapters, as PEFT starts them: A uniform in ±1/sqrt(in_features) (Kaiming, a = sqrt 5), B zero."""
        rng = adapter_generator(seed)
        made = []
        for group in groups:
            bound = group.in_features**-0.5
            made.append(
                tuple(
                    Adapter(
                        target.name,
                        Parameter.of(rng.uniform(-bound, bound, (rank, group.in_features)).astype(np.float32)),
                        Parameter.of(np.zeros((target.out_features, rank), np.float32)),
                        scaling,
                    )
                    for target in group.targets
                )
            )
        return cls(made, [Unit(indices) for indices in group_units(groups, unit)], kill_every)

    def __iter__(self) -> Iterator[Adapter]:
        for group in self.groups:
            yield from group

    def of_unit(self, unit: Unit) -> Iterator[Adapter]:
        for group in unit.groups:
            yield from self.groups[group]

    def scale(self, group: int) -> float:
        """What kill-and-revive multiplies a group's deltas by: 1, or less while its unit fades."""
        unit = self._unit_of[group]
        if unit.state is UnitState.KILLED:
            return 0.0
        if unit.state is UnitState.FADING:
            return max(0.0, 1.0 - unit.fade_age / (self.kill_every + 1))
        return 1.0

    def is_trained(self, group: int) -> bool:
        return self._unit_of[group].state is UnitState.ACTIVE

    def obey(self, states: ByteArray) -> None:
        """Take the states of a signal. Nothing is deleted, whatever it says."""
        for unit, state in zip(self.units, states, strict=True):
            new = UnitState(int(state))
            if new is UnitState.FADING:
                unit.fade_age = unit.fade_age + 1 if unit.state is UnitState.FADING else 1
            else:
                unit.fade_age = 0
            unit.state = new

    def states(self) -> ByteArray:
        return np.array([unit.state for unit in self.units], np.uint8)

    def zero_grad(self) -> None:
        for adapter in self:
            adapter.lora_A.grad = adapter.lora_B.grad = None
