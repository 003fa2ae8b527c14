"""What was trained, from what crosses at an exchange group: adapters are linear, and both sides of them are seen.

::

    lora         forward    delta_j  = M_j x         M_j = scaling · B_j A, (out_features, in_features), of rank r
                 backward   grad_x   = Σ_j M_j^T grad_delta_j
    bottleneck   forward    y        = R u           R times the scaling, (r, r)
    ffa          forward    delta_j  = B_j z         B_j times the scaling, (out_features, r)

A row is a token. The forward pass alone gives M where there are as many different rows as x is wide; with the
backward pass, which gives M's row space, r rows are enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_SINGULAR_VALUE = 1e-3
"""Smaller ones, of the largest, are taken for rounding of the wire."""
_LOST_SINGULAR_VALUE = 1e-7


def solve(inputs: Tensor, outputs: Tensor, *, least: float = 1e-5) -> Tensor:
    """The smallest matrix W (out, in) with ``outputs = inputs W^T``, nearly; of (rows, in) and (rows, out).

    ``least``: singular values of ``inputs`` below so much of the largest count as zero.
    """
    values, left, right = _singular(inputs)
    kept = values > least * values.max()
    return ((outputs.double().T @ left[:, kept]) / values[kept] @ right[:, kept].T).float()


def product_from_forward(inputs: Tensor, deltas: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Each target module's M, (out, in), from (rows, in) and (rows, out) each: one-sided, exact where rows span x."""
    columns = [_span(delta, rank) for delta in deltas]
    solved = solve(inputs, _narrowed(deltas, columns), least=LEAST_SINGULAR_VALUE)
    return [each @ part for each, part in zip(columns, solved.split(rank), strict=True)]


def product_from_both(inputs: Tensor, deltas: Sequence[Tensor], input_grads: Tensor, rank: int) -> list[Tensor]:
    """Each target module's M, (out, in): two-sided, from at least ``rank`` rows a target module.

    Args:
        inputs: (rows, in); deltas: (rows, out) of each target module.
        input_grads: (rows, in), which their backward pass gave.
    """
    # All rows of M lie in what the backward pass gave, and all columns in what the forward pass gave: what is left to
    # find is a small matrix between the two.
    return _between(_span(input_grads, rank * len(deltas)), inputs, deltas, rank)


def product_from_few(inputs: Tensor, deltas: Sequence[Tensor], input_grads: Tensor, rank: int) -> list[Tensor]:
    """As ``product_from_both``, from the fewest rows: ``rank`` a target module in each direction, chosen well."""
    count = rank * len(deltas)
    rows = _span(input_grads[choose_rows(input_grads, count)], count)
    chosen = choose_rows(inputs @ rows, count)
    return _between(rows, inputs[chosen], [delta[chosen] for delta in deltas], rank)


def _between(rows: Tensor, inputs: Tensor, deltas: Sequence[Tensor], rank: int) -> list[Tensor]:
    columns = [_span(delta, rank) for delta in deltas]
    solved = solve(inputs @ rows, _narrowed(deltas, columns))
    return [each @ part @ rows.T for each, part in zip(columns, solved.split(rank), strict=True)]


def _narrowed(deltas: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """Each target module's outputs in its own columns, side by side."""
    return torch.cat([delta @ each for delta, each in zip(deltas, columns, strict=True)], 1)


def choose_rows(values: Tensor, count: int) -> Tensor:
    """``count`` rows of (rows, width) that are as far from depending on each other as a greedy choice gets; int64."""
    left = values.double().clone()
    chosen: list[int] = []
    for _ in range(min(count, len(values))):
        norms = left.square().sum(1)
        best = int(norms.argmax())
        chosen.append(best)
        direction = left[best] / norms[best].sqrt().clamp_min(1e-300)
        left -= torch.outer(left @ direction, direction)
    return torch.tensor(chosen)


def _span(rows: Tensor, rank: int) -> Tensor:
    """Orthonormal (width, rank) of what (rows, width) mostly lie in."""
    _, _, right = _singular(rows)
    return right[:, -rank:].float()


def _singular(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values, ascending, left and right vectors (rows, n) and (width, n) of (rows, width), in float64.

    By way of the smaller of both products with itself, which is several times faster; values below 1e-7 of the largest
    are lost, and the wire's rounding is far above that: their vectors on the longer side are zero.
    """
    exact = rows.double()
    is_wide = len(rows) <= rows.shape[1]
    squares, vectors = torch.linalg.eigh(exact @ exact.T if is_wide else exact.T @ exact)
    values = squares.clamp_min(0).sqrt()
    others = (exact.T if is_wide else exact) @ vectors / values
    others = torch.where(values > _LOST_SINGULAR_VALUE * values[-1], others, 0.0)
    return (values, vectors, others) if is_wide else (values, others, vectors)
