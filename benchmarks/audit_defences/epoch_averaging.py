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
    """Observations of one text.

    Attributes:
        total: float32 (length, width), their sum; centred is the same without what all rows have in common.
    """

    indices: list[int]
    total: Tensor
    centred: Tensor


@torch.no_grad()
def average_repeats(observations: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Find which observed sequences are the same text, and average them.

    Args:
        observations: each (length, width), any floating dtype.

    Returns: for each text the indices of its observations, ascending, and their mean, float32 (length, width). Texts
    are in the order of their first observation; one that was seen once is a group of its own.
    """
    if not observations:
        return []
    everything = torch.cat([rows.float() for rows in observations])
    common = everything.mean(0)
    spread = _spread(everything - common)
    groups: list[_Group] = []
    by_length: dict[int, list[_Group]] = {}
    for index, rows in enumerate(observations):
        centred = rows.float() - common
        alike = by_length.setdefault(len(rows), [])
        best = _most_alike(centred, alike, spread)
        if best is None:
            best = _Group([], torch.zeros_like(centred), torch.zeros_like(centred))
            groups.append(best)
            alike.append(best)
        best.indices.append(index)
        best.total += rows.float()
        best.centred += centred
    return [(group.indices, group.total / len(group.indices)) for group in groups]


def _most_alike(rows: Tensor, groups: Sequence[_Group], spread: float) -> _Group | None:
    """The group that shows the same text as rows (length, width), None where there is none."""
    best: tuple[float, _Group] | None = None
    for group in groups:
        cosines = torch.cosine_similarity(rows, group.centred, dim=1)  # (length,)
        mean = float(cosines.mean())
        if _is_same_text(cosines, spread, rows.shape[1]) and (best is None or mean > best[0]):
            best = mean, group
    return None if best is None else best[1]


def _is_same_text(cosines: Tensor, spread: float, width: int) -> bool:
    """By the cosines (length,) of the rows at the same places; ``spread`` is their deviation in different texts."""
    length = len(cosines)
    mean = float(cosines.mean())
    if mean <= _DEVIATIONS * spread / math.sqrt(length):
        return False
    worse = cosines.sort().values[: -(-length // 2)]
    by_noise = (1.0 - mean) / math.sqrt(width)
    half_alike = float(worse.mean()) >= _WORSE_HALF * mean - _HALF_NORMAL * by_noise
    return half_alike and float(worse[0]) >= _WORST_ROW * mean - _ROW_DEVIATIONS * by_noise


def _spread(rows: Tensor) -> float:
    """Standard deviation of the cosine of two rows that have nothing to do with each other, from rows themselves."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(rows.device)
    cosines = torch.cosine_similarity(rows, rows[order], dim=1)
    # Some pairs are the same token: the middle 68 % tells the deviation without them.
    ordered = cosines.sort().values
    low, high = (float(ordered[int(share * len(ordered))]) for share in (0.16, 0.84))
    return max((high - low) / 2, 1.0 / math.sqrt(rows.shape[1]))
