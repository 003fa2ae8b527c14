"""How many tokens a micro-batch counts as, and how it is cut to fit: one rule for both sides.

A base model that can pack runs sequences end to end. One that cannot runs a row a sequence, each as long as the
longest, and padding costs what a token costs. So a micro-batch *counts* as its tokens in the one case, and as sequences
times longest in the other: against ``max_tokens``, quotas and memory alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .tensors import IntArray


def counted_tokens(lengths: IntArray, *, packs: bool) -> int:
    """What sequences of ``lengths``, int32 (sequences,) and not empty, count as."""
    return int(lengths.sum(dtype=np.int64)) if packs else len(lengths) * int(lengths.max())


def cut_to_fit(lengths: Sequence[int], *, max_tokens: int, packs: bool) -> list[range]:
    """Cut sequences, in their order, into as few pieces as count as ``max_tokens`` at most; gives their indices.

    A sequence that is too long by itself is a piece by itself.
    """
    pieces: list[range] = []
    start, total, longest = 0, 0, 0
    for index, length in enumerate(lengths):
        total, longest = total + length, max(longest, length)
        counted = total if packs else (index + 1 - start) * longest
        if counted > max_tokens and index > start:
            pieces.append(range(start, index))
            start, total, longest = index, length, length
    if lengths:
        pieces.append(range(start, len(lengths)))
    return pieces
