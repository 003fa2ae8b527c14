"""Averaging over epochs: an example crosses again in each of them, and noise that is fresh each time averages out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# Two texts without a common token have row cosines of mean 0. Six standard deviations above it one pair in a billion is
# by chance: 10,000 sequences, which are 50 million pairs, give a wrong group once in twenty recordings.
_DEVIATIONS: Final = 6.0
# Texts may share tokens at the same places, such as a chat template's. So it must be all rows that are alike: the worse
# half of them nearly as much as all, and each of them by itself. Both only as far as noise lets that be seen: where it
# is several times as large as the rows, texts that differ in few tokens are taken for one.
_WORSE_HALF: Final = 0.6
_HALF_NORMAL: Final = 0.8  # sqrt(2 / pi): so many deviations the worse half of normal values is below the mean
_WORST_ROW: Final = 0.3
_ROW_DEVIATIONS: Final = 4.0


@dataclass
class _Group:
    """Observations of one text: indices, their sum, float32 (length, width), and that without what all rows share."""

    indices: list[int]
    total: Tensor
    centred: Tensor


def average_repeats(observations: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Find which observed sequences are the same text, and average them.

    Args:
        observations: each (length, width), any floating dtype.

    Returns: for each text the indices of its observations, ascending, and their mean, float32 (length, width).
    """
    everything = torch.cat([rows.float() for rows in observations])
    common = everything.mean(0)
    spread = _spread(everything - common)
    groups: list[_Group] = []
    for index, rows in enumerate(observations):
        centred, best, most = rows.float() - common, None, -1.0
        for group in (group for group in groups if len(group.total) == len(rows)):
            cosines = torch.cosine_similarity(centred, group.centred, dim=1)  # (length,)
            if float(cosines.mean()) > most and _is_same_text(cosines, spread, rows.shape[1]):
                best, most = group, float(cosines.mean())
        if best is None:
            best = _Group([], torch.zeros_like(centred), torch.zeros_like(centred))
            groups.append(best)
        best.indices.append(index)
        best.total += rows.float()
        best.centred += centred
    return [(group.indices, group.total / len(group.indices)) for group in groups]


def _is_same_text(cosines: Tensor, spread: float, width: int) -> bool:
    """By the cosines (length,) of the rows at the same places; ``spread`` is their deviation in different texts."""
    length, mean = len(cosines), float(cosines.mean())
    if mean <= _DEVIATIONS * spread / math.sqrt(length):
        return False
    worse = cosines.sort().values[: -(-length // 2)]
    by_noise = (1.0 - mean) / math.sqrt(width)
    half_alike = float(worse.mean()) >= _WORSE_HALF * mean - _HALF_NORMAL * by_noise
    return half_alike and float(worse[0]) >= _WORST_ROW * mean - _ROW_DEVIATIONS * by_noise


def _spread(rows: Tensor) -> float:
    """Standard deviation of the cosine of two rows that have nothing to do with each other, from rows themselves."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(rows.device)
    # Some pairs are the same token: the middle 68 % tells the deviation without them.
    ordered = torch.cosine_similarity(rows, rows[order], dim=1).sort().values
    low, high = (float(ordered[int(share * len(ordered))]) for share in (0.16, 0.84))
    return max((high - low) / 2, 1.0 / math.sqrt(rows.shape[1]))
