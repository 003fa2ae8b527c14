"""Weights of four bits: in groups of a row with a scale each, two values in a byte.

``weight[row, group * size + place] = value * scale`` with ``value`` from -8 to 7. The byte ``place`` of a group holds
the values of ``place`` and of ``place + size / 2``, ``16 * second + first + 8``: as an int8, so that it is widened by
arithmetic that all engines have.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

GROUP_SIZES: Final = (32, 16)
"""Values that share a scale: the first of these that divides a row."""

LOWEST: Final = -8
_PIECE_VALUES: Final = 1 << 18  # of a weight at a time: 1 MB when wide, which a core's caches hold
_TRIED: Final = tuple(step / 20 for step in range(14, 23))  # scales, of the one that wastes no value


def group_size(in_features: int) -> int | None:
    """Of a weight whose rows have so many values; None: it has no groups, and no form of four bits."""
    return next((size for size in GROUP_SIZES if in_features % size == 0), None)


def quantise_groups(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """int8 (out, groups, size / 2) and scales fp16 (out, groups, 1) of a weight (out, in).

    Each group has the scale with the least squared error of those around the one that makes its largest value -8. It is
    infinite where fp16 cannot hold any.
    """
    pieces = weight.split(max(1, _PIECE_VALUES // weight.shape[1]))
    packed, scales = zip(*(_quantise(piece.float().reshape(len(piece), -1, size)) for piece in pieces), strict=True)
    return torch.cat(packed), torch.cat(scales)


def _quantise(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a few rows (rows, groups, size)."""
    extremes = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    usual = extremes / LOWEST
    best = torch.full_like(usual, torch.inf)
    scales = torch.full_like(usual, torch.inf).half()
    for factor in _TRIED:
        tried = (usual * factor).half()
        tried[tried == 0] = 1.0
        rounded = _rounded(groups, tried)
        error = rounded.mul_(tried.float()).sub_(groups).square_().sum(2, keepdim=True)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, tried, scales)
    first, second = _rounded(groups, scales).chunk(2, 2)
    return (16 * second + first - LOWEST).to(torch.int8), scales


def _rounded(groups: Tensor, scales: Tensor) -> Tensor:
    return torch.div(groups, scales.float()).round_().clamp_(LOWEST, -LOWEST - 1)


def widened(packed: Tensor, scales: Tensor) -> Tensor:
    """float32 (out, in) of what ``quantise_groups`` gives; every value is exact."""
    stored = packed.to(torch.float32)
    second = torch.floor(stored * (1 / 16))
    first = stored - second * 16 + LOWEST
    values = torch.cat((first, second), 2) * scales.to(torch.float32)
    return values.reshape(packed.shape[0], packed.shape[1] * packed.shape[2] * 2)


@torch.library.custom_op("dlora::widen_int4", mutates_args=(), schema="(Tensor packed, Tensor scales) -> Tensor")
def widen_int4(packed: Tensor, scales: Tensor) -> Tensor:
    """``widened``, which a trace has as one operator: engines differ in how they compute it well."""
    return widened(packed, scales)


@widen_int4.register_fake
def _(packed: Tensor, scales: Tensor) -> Tensor:
    return packed.new_empty((packed.shape[0], packed.shape[1] * packed.shape[2] * 2), dtype=torch.float32)


WIDEN: Final = torch.ops.dlora.widen_int4.default
