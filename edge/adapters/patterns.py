"""Patterns of module names in PEFT's configurations (``rank_pattern``, ``alpha_pattern``).

They are strangers' programs for ``re``, which has no limit of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dlora.protocol.adapter_record import CONFIG_NAME
from dlora.protocol.errors import CheckpointError

# PEFT writes a pattern a module where ranks differ: 900 modules have the largest of models that are not mixtures.
_MAX_PATTERNS: Final = 4096
_MAX_PATTERN: Final = 1024
_MAX_CHARACTERS: Final = 10**9  # that matching may look at: some seconds
_REPETITION: Final = re.compile(r"[*+?{]")


def read_patterns(directory: Path, config: Mapping[str, Any], key: str) -> dict[str, re.Pattern[str]]:
    """The patterns under ``key``, ready to match a module's whole name as PEFT matches them.

    Raises ``CheckpointError`` for one that is malformed or could be slow.
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{directory}: {key} in {CONFIG_NAME} must be an object")
    if len(patterns) > _MAX_PATTERNS:
        raise CheckpointError(f"{directory}: {key} has {len(patterns)} patterns; {_MAX_PATTERNS} can be used")
    found = {}
    for pattern in patterns:
        if _is_slow(pattern):
            raise CheckpointError(f"{directory}: {key} has a pattern that is too complicated; name the modules instead")
        try:
            found[pattern] = re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError):
            raise CheckpointError(f"{directory}: {key} has a malformed pattern {pattern!r}") from None
    return found


def check_matching_time(directory: Path, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raise ``CheckpointError`` where matching every pattern with every name could take long.

    ``re`` may try a name's characters once for each repetition, and PEFT's ``(.*\\.)?`` in front is one more.
    """
    repetitions = Counter(len(_REPETITION.findall(pattern)) + 1 for pattern in patterns)
    lengths = Counter(map(len, names))
    characters = sum(
        many * count * length**power for power, many in repetitions.items() for length, count in lengths.items()
    )
    if characters > _MAX_CHARACTERS:
        raise CheckpointError(f"{directory} has too complicated patterns for {len(names)} modules; name the modules")


def first_match(patterns: Mapping[str, re.Pattern[str]], name: str) -> str | None:
    """The pattern that PEFT would take for a module: the first that matches its whole name."""
    return next((pattern for pattern, compiled in patterns.items() if compiled.match(name)), None)


def _is_slow(pattern: str) -> bool:
    """Whether matching could take for ever: a pattern is a stranger's program, and ``re`` has no limit.

    Names are short, so a few repetitions and groups are fine, and repeated groups are not: ``(a|a)*``.
    """
    if len(pattern) > _MAX_PATTERN:
        return True
    repeated_group = re.search(r"\)[*+?{]", pattern) is not None
    return repeated_group or pattern.count("(") > 3 or len(_REPETITION.findall(pattern)) > 3
