"""What adapters stand beside: target modules, the exchange groups that they form, and the units of groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from .choices import UnitKind


class TargetSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One target module: its full name in the base model, as PEFT spells it, and the width of its output."""

    name: str
    out_features: Annotated[int, msgspec.Meta(ge=1, le=2**24)]


class GroupSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An exchange group: the target modules of one block that share one input of width ``in_features``."""

    block: Annotated[int, msgspec.Meta(ge=0, le=2**16)]
    in_features: Annotated[int, msgspec.Meta(ge=1, le=2**24)]
    targets: tuple[TargetSpec, ...]

    @property
    def out_features(self) -> int:
        """Width of all target modules' outputs together."""
        return sum(target.out_features for target in self.targets)


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
