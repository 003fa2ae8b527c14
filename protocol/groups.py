"""What adapters stand beside: target modules, the exchange groups that they form, and the units of groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Final

import msgspec

from .choices import UnitKind

MAX_GAIN: Final = 2.0**40

Gain = Annotated[float, msgspec.Meta(ge=1 / MAX_GAIN, le=MAX_GAIN)]


class TargetSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One target module, by its full name in the base model, as PEFT spells it, and the width of its output.

    ``gain`` is what the output of its adapters is multiplied by before it is added, so that a learning rate means the
    same for every module of every model: see ``dlora.export.gains``.
    """

    name: str
    out_features: Annotated[int, msgspec.Meta(ge=1, le=2**24)]
    gain: Gain = 1.0


class GroupSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An exchange group: the target modules of one block that share one input of width ``in_features``."""

    block: Annotated[int, msgspec.Meta(ge=0, le=2**16)]
    in_features: Annotated[int, msgspec.Meta(ge=1, le=2**24)]
    targets: tuple[TargetSpec, ...]

    @property
    def out_features(self) -> int:
        """Width of all target modules' outputs together."""
        return sum(target.out_features for target in self.targets)


def with_gains(groups: Sequence[GroupSpec], gain_of: Callable[[str], float]) -> tuple[GroupSpec, ...]:
    """``groups`` whose target modules have the gain that ``gain_of`` gives for their names."""
    return tuple(
        msgspec.structs.replace(
            group,
            targets=tuple(msgspec.structs.replace(target, gain=gain_of(target.name)) for target in group.targets),
        )
        for group in groups
    )


def without_gains(groups: Sequence[GroupSpec]) -> tuple[GroupSpec, ...]:
    """``groups`` as the base model has them, whatever their adapters are multiplied by."""
    return with_gains(groups, lambda _: 1.0)


def group_units(groups: Sequence[GroupSpec], kind: UnitKind) -> tuple[tuple[int, ...], ...]:
    """The exchange groups (indices) of each unit, in execution order."""
    if kind == "group":
        return tuple((index,) for index in range(len(groups)))
    blocks: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        blocks.setdefault(group.block, []).append(index)
    return tuple(tuple(indices) for _, indices in sorted(blocks.items()))


def evenly(numbers: Sequence[int], count: int) -> tuple[int, ...]:
    """``count`` of the ascending ``numbers``, at most as many as there are, evenly over them; the last one included."""
    gaps = (-(-index * len(numbers) // count) for index in range(count))  # rounded up
    return tuple(sorted(numbers[-1 - gap] for gap in gaps))
