"""Whether a text was among those that crossed, for an attacker who has the text and what an attack made of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

ALIKE_FROM: Final = 0.9
"""Share of tokens that must agree: an attack may have missed some."""
LEAST_SHARE: Final = 0.5
"""Texts may cross as far as their last label only: so much of a candidate must have crossed."""


def is_member(candidate: Sequence[int], found: Sequence[Sequence[int]]) -> bool:
    """Whether one of the texts that were found is the candidate, or begins it."""
    return any(_is_beginning(text, candidate) for text in found)


def _is_beginning(text: Sequence[int], candidate: Sequence[int]) -> bool:
    if not LEAST_SHARE * len(candidate) <= len(text) <= len(candidate):
        return False
    return sum(a == b for a, b in zip(text, candidate, strict=False)) >= ALIKE_FROM * len(text)


def swap_ends(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Texts that are none: the first half of each with the second half of the next one."""
    return [
        [*first[: len(first) // 2], *second[len(second) // 2 :]]
        for first, second in zip(texts, [*texts[1:], *texts[:1]], strict=True)
    ]
