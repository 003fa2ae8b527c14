"""What a user's words name: blocks, modules and units."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from dlora.protocol.choices import UnitKind
from dlora.protocol.errors import UsageError
from dlora.protocol.groups import GroupSpec
from dlora.protocol.kill_revive import MAX_UNITS
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import last_blocks, number_ranges, spread_blocks

_COUNTED: Final = {"spread": spread_blocks, "last": last_blocks}


def target_modules_of(text: str | None) -> tuple[str, ...]:
    """The names in ``--target-modules``; none: none were given. Raises ``UsageError`` where there is only nothing."""
    names = [name.strip() for name in (text or "").split(",")]
    given = tuple(dict.fromkeys(filter(None, names)))
    if text is not None and not given:
        raise UsageError("--target-modules is empty; name some, separated by commas, or leave it out")
    return given


def parse_blocks(text: str, manifest: Manifest) -> tuple[int, ...]:
    """The blocks that ``--blocks`` names; none: all. Raises ``UsageError``."""
    if text.strip() == "all":
        return tuple(sorted({group.block for group in manifest.groups}))
    counted = re.fullmatch(r"\s*(spread|last):([1-9][0-9]{0,4})\s*", text)
    if counted is not None:
        return _COUNTED[counted[1]](manifest, int(counted[2]))
    return parse_numbers(text, "--blocks", "blocks")


def parse_units(text: str, option: str, kind: UnitKind, groups: Sequence[GroupSpec]) -> tuple[int, ...]:
    """The units that the user names: a block by its number in the base model, a group by its place among the trained.

    Raises ``UsageError`` for a block that is not trained.
    """
    numbers = parse_numbers(text, option, "units")
    if kind == "group":
        return numbers
    blocks = sorted({group.block for group in groups})
    for number in numbers:
        if number not in blocks:
            raise UsageError(f"{option}: block {number} is not trained; blocks {number_ranges(blocks)} are")
    return tuple(blocks.index(number) for number in numbers)


def parse_numbers(text: str, option: str, what: str) -> tuple[int, ...]:
    """``"0,3,26-29"`` to ``(0, 3, 26, 27, 28, 29)``; ``what`` they number is for the ``UsageError`` that it raises."""
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        last = last if dash else first
        # Nine digits are enough; int() refuses thousands.
        is_number = all(each.isdecimal() and len(each) < 10 for each in (first, last))
        if not (is_number and int(first) <= int(last) < MAX_UNITS):
            raise UsageError(f"{option} {text[:80]!r}: write {what} as 0,3,26-29")
        found.update(range(int(first), int(last) + 1))
    if text and not found:
        raise UsageError(f"{option} {text[:80]!r}: write {what} as 0,3,26-29, or leave it out")
    return tuple(sorted(found))
