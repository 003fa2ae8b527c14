"""All adapters of a run, by exchange group and by the units that Kill and Revive switches.

All of it stays here whatever Kill and Revive does: a killed unit keeps its weights, moments and step count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dlora.edge.engine.engine import Array
from dlora.edge.seeds import Seed, adapter_generator
from dlora.protocol.adapters import AdapterSpec, crossings, kind_of
from dlora.protocol.choices import UnitKind, WireDtype
from dlora.protocol.groups import GroupSpec, group_units
from dlora.protocol.kill_revive import UnitState
from dlora.protocol.tensors import ByteArray, FloatArray
from dlora.protocol.wire_codecs import encode_floats

from .bottleneck import BottleneckGroup
from .ffa import FfaGroup
from .kind import GroupAdapters, Parameter
from .lora import LoraGroup

DEVICE_KINDS: Final[dict[str, type[GroupAdapters]]] = {
    "lora": LoraGroup,
    "ffa": FfaGroup,
    "bottleneck": BottleneckGroup,
}
"""By the names of ``dlora.protocol.adapters.KINDS``."""


@dataclass
class Unit:
    """What Kill and Revive switches.

    Attributes:
        adam_steps: how often its adapters were stepped, for AdamW's bias correction.
        fade_age: steps since it began to fade.
        has_learnt: whether it had an effect before the first step of this part of the run.
    """

    groups: tuple[int, ...]
    state: UnitState = UnitState.ACTIVE
    adam_steps: int = 0
    fade_age: int = 0
    has_learnt: bool = False


@dataclass(eq=False)
class AdapterSet:
    """All adapters.

    Attributes:
        adapter_spec: their kind; group_specs: the exchange groups; groups: the adapters of each.
        scaling: alpha over rank, of all.
        kill_every: steps that fading takes.
    """

    adapter_spec: AdapterSpec
    group_specs: tuple[GroupSpec, ...]
    groups: Sequence[GroupAdapters]
    units: Sequence[Unit]
    scaling: float
    kill_every: int

    def __post_init__(self) -> None:
        self._unit_of = {group: unit for unit in self.units for group in unit.groups}

    @classmethod
    def create(
        cls,
        adapter_spec: AdapterSpec,
        groups: Sequence[GroupSpec],
        *,
        scaling: float,
        seed: Seed,
        unit: UnitKind,
        kill_every: int,
        draws_state: bool = False,
        state_dtype: WireDtype = "fp32",
    ) -> AdapterSet:
        """Fresh adapters. Raises ``UsageError`` for a kind that there is not, or a rank that its groups cannot have.

        Args:
            draws_state: whether the device draws what the server is to keep, where the server could make it too.
            state_dtype: how what it draws is stored.
        """
        draws_state |= not kind_of(adapter_spec).server_makes_state
        crossings(adapter_spec, groups)
        random, kind = adapter_generator(seed), DEVICE_KINDS[adapter_spec.kind]
        made = [kind.create(adapter_spec, group, scaling=scaling, random=random) for group in groups]
        for group, adapters in zip(groups, made, strict=True):
            adapters.state_shapes = kind_of(adapter_spec).state_shapes(adapter_spec, group)
            if draws_state:
                drawn = kind.draw_state(adapter_spec, group, random)
                adapters.adapter_state = tuple(encode_floats(tensor, state_dtype) for tensor in drawn)
        units = [Unit(indices) for indices in group_units(groups, unit)]
        return cls(adapter_spec, tuple(groups), made, units, scaling=scaling, kill_every=kill_every)

    @property
    def gains(self) -> dict[str, float]:
        """Of all target modules, by name."""
        return {target.name: target.gain for group in self.group_specs for target in group.targets}

    def parameters(self) -> dict[str, Parameter]:
        """Everything that is trained, by full name."""
        return {name: parameter for group in self.groups for name, parameter in group.parameters().items()}

    def for_recording(self) -> list[tuple[float, dict[str, FloatArray]]]:
        """Of each group what its effect is multiplied by, and what is trained, by full name."""
        values = ({name: each.value for name, each in group.parameters().items()} for group in self.groups)
        return [(self.scaling * self.scale(index), named) for index, named in enumerate(values)]

    def trained_parameters(self) -> frozenset[str]:
        """The full names of what is trained in this step: that of active units."""
        return frozenset(
            name for index, group in enumerate(self.groups) if self.is_trained(index) for name in group.parameters()
        )

    def state(self) -> dict[str, Array]:
        """All tensors that the next step depends on, by name."""
        return {name: tensor for group in self.groups for name, tensor in group.state().items()}

    def load_state(self, tensors: Mapping[str, Array]) -> None:
        """Go on from a ``state``. Raises ``KeyError`` or ``ValueError`` for one of other adapters."""
        for group in self.groups:
            group.load_state(tensors)

    def parts(self) -> dict[str, Array]:
        """What groups with an effect consist of, by name, where the server keeps a part of them; see ``parts.py``."""
        named: dict[str, Array] = {}
        for index, group in enumerate(self.groups):
            if group.adapter_state and self.scale(index) > 0:
                named |= group.parts(self.scale(index))
        return named

    def of_unit(self, unit: Unit) -> Iterator[GroupAdapters]:
        for group in unit.groups:
            yield self.groups[group]

    def scale(self, group: int) -> float:
        """What Kill and Revive multiplies a group's effect by: 1, or less while its unit fades."""
        unit = self._unit_of[group]
        if unit.state is UnitState.KILLED:
            return 0.0
        if unit.state is UnitState.FADING:
            return max(0.0, 1.0 - unit.fade_age / (self.kill_every + 1))
        return 1.0

    def is_trained(self, group: int) -> bool:
        return self._unit_of[group].state is UnitState.ACTIVE

    def apply_signal(self, states: ByteArray) -> None:
        """Take the states of a signal, uint8 (units,). Nothing is deleted, whatever it says."""
        for unit, state in zip(self.units, states, strict=True):
            new = UnitState(int(state))
            if new is UnitState.FADING:
                unit.fade_age = unit.fade_age + 1 if unit.state is UnitState.FADING else 1
            else:
                unit.fade_age = 0
            unit.state = new

    def states(self) -> ByteArray:
        """uint8 (units,), a ``UnitState`` each."""
        return np.array([unit.state for unit in self.units], np.uint8)

    def zero_grad(self) -> None:
        for parameter in self.parameters().values():
            parameter.grad = None
