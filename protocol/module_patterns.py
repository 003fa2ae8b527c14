"""Patterns of module names in PEFT's configurations (``rank_pattern``, ``alpha_pattern``).

PEFT gives them to ``re``: a stranger's programs, some of which take for ever. Here only those are read that are no
programs: names, with what stands for one character or for any number of them. Users write little else, and PEFT itself
writes whole names. Groups and repetitions are refused: what they say can be said in several patterns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from .adapter_record import CONFIG_NAME
from .errors import CheckpointError

# PEFT writes a pattern a module where ranks differ: 900 modules have the largest of models that are not mixtures.
_MAX_PATTERNS: Final = 4096
_MAX_PATTERN: Final = 1024
_MAX_GAPS: Final = 8  # .* of a pattern
_MAX_ALL: Final = 1 << 18  # characters of all patterns: some hundred ms to compile
_MAX_CHARACTERS: Final = 10**9  # that matching may look at: some seconds
_LEAST_CHARACTERS: Final = 32  # what a try takes that looks at none
_CHARACTER: Final = r"[A-Za-z0-9_-]|\\\.|\.|\[[0-9]-[0-9]\]"  # what stands for one
_ALTERNATIVE: Final = re.compile(rf"(\^?)((?:{_CHARACTER}|\.\*)*)\$?")
_CHARACTERS: Final = re.compile(_CHARACTER)


class ModulePattern(NamedTuple):
    """One pattern, or one of its alternatives, that matches as ``re.match(rf"(.*\\.)?({pattern})$", name)`` does.

    Attributes:
        whole: matches the whole name, or where ``length`` is known, what is left of it.
        length: of what it matches, in characters; None: any.
        at_start: whether nothing may stand before it (``^``); otherwise what does must end with a dot.
    """

    whole: re.Pattern[str]
    length: int | None
    at_start: bool

    def matches(self, name: str) -> bool:
        """Whether it matches a module's name, in time that grows with its length squared at most."""
        if self.length is None:
            return self.whole.fullmatch(name) is not None
        start = len(name) - self.length
        if start < 0 or (start and (self.at_start or name[start - 1] != ".")):
            return False
        return self.whole.fullmatch(name, start) is not None


Patterns = Mapping[str, Sequence[ModulePattern]]


def read_patterns(directory: Path, config: Mapping[str, Any], key: str) -> Patterns:
    """The patterns under ``key``, ready to match a module's whole name as PEFT matches them. Raises ``CheckpointError``
    for more than names and ``.``, ``\\.``, ``.*``, ``[0-9]``, ``|``, ``^`` or ``$``."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{directory}: {key} in {CONFIG_NAME} must be an object")
    count = sum(pattern.count("|") + 1 for pattern in patterns)
    if count > _MAX_PATTERNS:
        raise CheckpointError(f"{directory}: {key} has {count} patterns; {_MAX_PATTERNS} can be used")
    if sum(len(pattern) for pattern in patterns if len(pattern) <= _MAX_PATTERN) > _MAX_ALL:  # longer ones: below
        raise CheckpointError(f"{directory}: the patterns of {key} may have {_MAX_ALL:,} characters in all")
    found = {}
    for pattern in patterns:
        try:
            found[pattern] = _read(pattern)
        except (ValueError, re.error):  # the latter for [5-1]
            raise CheckpointError(
                f"{directory}: {key} has {pattern[:80]!r}, which may be slow to match; name the modules instead, as "
                r"model.layers.0.mlp or with no more than . \. .* [0-9] | ^ $"
            ) from None
    return found


def check_matching_time(directory: Path, patterns: Iterable[Sequence[ModulePattern]], names: Sequence[str]) -> None:
    """Raise ``CheckpointError`` where matching every pattern with every name could take long."""
    kinds = Counter(alternative.length is None for pattern in patterns for alternative in pattern)
    lengths = Counter(map(len, names))
    characters = sum(
        many * count * max(length, _LEAST_CHARACTERS) ** (2 if is_open else 1)
        for is_open, many in kinds.items() for length, count in lengths.items()
    )  # fmt: skip
    if characters > _MAX_CHARACTERS:
        raise CheckpointError(f"{directory} has too many patterns for {len(names)} modules; name the modules")


def first_match(patterns: Patterns, name: str) -> str | None:
    """The pattern that PEFT would take for a module: the first that matches its whole name."""
    return next((text for text, pattern in patterns.items() if any(each.matches(name) for each in pattern)), None)


def _read(pattern: str) -> list[ModulePattern]:
    """The alternatives of a pattern. Raises ``ValueError`` and ``re.error``."""
    if len(pattern) > _MAX_PATTERN:
        raise ValueError
    found = []
    for text in pattern.split("|"):
        parts = _ALTERNATIVE.fullmatch(text)
        if parts is None:
            raise ValueError
        at_start, pieces = bool(parts[1]), parts[2].split(".*")
        if len(pieces) > _MAX_GAPS + 1:
            raise ValueError
        if len(pieces) == 1:
            found.append(ModulePattern(re.compile(pieces[0]), len(_CHARACTERS.findall(pieces[0])), at_start))
            continue
        found.append(ModulePattern(_whole(pieces), None, at_start))
        if not at_start:
            found.append(ModulePattern(_whole(["", rf"\.{pieces[0]}", *pieces[1:]]), None, at_start))
    return found


def _whole(pieces: Sequence[str]) -> re.Pattern[str]:
    """What matches pieces with anything between them. A piece that is found is never looked for again (``(?>``): where
    what follows fits further on, it fits after the first place as well. ``fnmatch`` does so too."""
    first, *others, last = pieces
    return re.compile(first + "".join(f"(?>.*?{piece})" for piece in others) + f".*{last}")
