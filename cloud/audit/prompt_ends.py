"""Where a prompt ends and its answer begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

LONGEST_MARKER: Final = 8
COMMON_FROM: Final = 0.9


def first_labels(lengths: Sequence[int], label_positions: Sequence[int]) -> list[int | None]:
    """Of each sequence its first labelled position, counted from its start; None where it has no label."""
    found: list[int | None] = []
    start = 0
    for length in lengths:
        inside = [position - start for position in label_positions if start <= position < start + length]
        found.append(min(inside, default=None))
        start += length
    return found


def common_marker_ends(texts: Sequence[Sequence[int]]) -> list[int | None]:
    """Of each text where its prompt ends, guessed: behind the words that nearly all texts have, each of them once, and
    of those the ones that come last. None where there are no such words.

    A template ends every prompt in the same way ("<|im_start|>assistant"); answers differ.
    """
    best: tuple[float, int, tuple[int, ...]] | None = None
    for length in range(1, LONGEST_MARKER + 1):
        counts: dict[tuple[int, ...], int] = {}
        for text in texts:
            # What ends the text is followed by no answer.
            for marker, times in Counter(tuple(text[at : at + length]) for at in range(len(text) - length)).items():
                counts[marker] = counts.get(marker, 0) + (times == 1)
        for marker, count in counts.items():
            if count < max(2, COMMON_FROM * len(texts)):
                continue
            ends = [end / len(text) for text in texts if (end := _last_end(text, marker)) is not None]
            candidate = (sum(ends) / len(ends), length, marker)
            best = candidate if best is None else max(best, candidate)
    if best is None:
        return [None] * len(texts)
    return [_last_end(text, best[2]) for text in texts]


def _last_end(text: Sequence[int], marker: Sequence[int]) -> int | None:
    """One past the last place of ``marker`` that something follows."""
    length = len(marker)
    for start in range(len(text) - length - 1, -1, -1):
        if tuple(text[start : start + length]) == tuple(marker):
            return start + length
    return None
