"""The labels of a step, from the gradient that the device sends at the last hidden states.

The server sent a row ``h`` and gets back the gradient ``g`` of the loss at it. With ``p = softmax(logits)``, ``W`` the
LM head's weight and ``c_u`` the slope of logit u (``logit_scale``, times that of the cap), a label v gives

    g = scale * d_v,    d_v = sum_u c_u p_u W_u - c_v W_v

and all but v and ``scale`` is known here. The scale is one over the labelled tokens of the step: the same for all rows.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dlora.cloud.model.ends import HeadEnd

_ROWS: Final = 64  # rows at a time: a few matrices of (rows, vocabulary) are held at once
_SLAB_VALUES: Final = 1 << 25  # numbers of the weight that are widened to float32 at a time
_CANDIDATES: Final = 32  # labels a row that are looked at closely
_MAX_ROUNDS: Final = 20


def match_labels(last_hidden: Tensor, grads: Tensor, head: HeadEnd) -> Tensor:
    """The likeliest label of each row, int64 (rows,), on the CPU.

    Where it is a guess, as for a row of zeros, it leans to the token that the model finds likeliest: labels mean
    something only above that token's own accuracy.

    First by direction alone, for which no scale is needed. Then, in turn: the scale, by least squares over all rows;
    and by back-substitution for each row the label whose gradient is nearest with that scale, norm and all.

    Args:
        last_hidden: float (rows, hidden_size), as the device received them: after the wire's rounding.
        grads: float (rows, hidden_size), as the server received them, of one step.
        head: of the base model; ``weight`` (vocabulary, hidden_size) may be of any float dtype.
    """
    device = head.weight.device
    lengths = torch.cat([slab.float().square().sum(1) for slab in _slabs(head.weight)])  # squared, (vocabulary,)
    parts = [
        _shortlist(hidden.float(), grad.float(), head, lengths)
        for hidden, grad in zip(last_hidden.to(device).split(_ROWS), grads.to(device).split(_ROWS), strict=True)
    ]
    # float64 from here on: of nearly equal sums only the difference counts.
    labels, along, squares = (torch.cat(each) for each in zip(*parts, strict=True))
    grad_squares = grads.to(device).double().square().sum(1)
    cosines = along / (squares * grad_squares[:, None]).sqrt().clamp_min(_TINY)
    chosen = cosines.argmax(1)
    scale = _fit_scale(along, squares, chosen)
    for _ in range(_MAX_ROUNDS):
        before = chosen
        chosen = (scale**2 * squares - 2 * scale * along).argmin(1)
        scale = _fit_scale(along, squares, chosen)
        if torch.equal(chosen, before):
            break
    return _pick(labels, chosen).cpu()


_TINY: Final = 1e-300


def _shortlist(hidden: Tensor, grads: Tensor, head: HeadEnd, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest labels of some rows by direction, and what is to be known of their ``d_v``.

    Of all labels only inner products are computed, from ``g W^T``, ``m W^T`` and ``|W_v|^2`` with
    ``m = sum_u c_u p_u W_u``; of the likeliest, the vectors themselves.

    Args:
        hidden, grads: float32 (rows, hidden_size).
        lengths: float32 (vocabulary,), the squared norms of the rows of the weight.

    Returns: int64 (rows, candidates) labels; float64 (rows, candidates) ``g . d_v``, and ``|d_v|^2``.
    """
    products = _times(hidden, head.weight)
    slopes, chances = _slopes(products, head), torch.softmax(head.logits(products), dim=1)
    mean = _weighted_rows(chances * slopes, head.weight)

    pulls = _times(grads, head.weight)
    along = (grads * mean).sum(1, keepdim=True) - slopes * pulls
    squares = mean.square().sum(1, keepdim=True) - 2 * slopes * _times(mean, head.weight) + slopes.square() * lengths
    cosines = along / squares.clamp_min(1e-30).sqrt()  # times the row's own norm, which is the same for all labels
    labels = cosines.topk(min(_CANDIDATES, cosines.shape[1]), dim=1).indices
    # The likeliest token always. Where the model is almost certain of it, its d_v is a small difference of large
    # vectors, and what was just computed of it is only rounding; its gradient is hardly more, and has no direction.
    labels = torch.cat([labels, chances.argmax(1, keepdim=True)], dim=1)

    # float64 (rows, candidates, hidden_size), so that there the difference is as good as the mean.
    own = slopes.gather(1, labels)[:, :, None].double() * head.weight[labels].double()
    vectors = mean[:, None].double() - own
    return labels, torch.einsum("rch,rh->rc", vectors, grads.double()), vectors.square().sum(2)


def _slopes(products: Tensor, head: HeadEnd) -> Tensor:
    """How fast each logit grows with its ``h W^T``; both (rows, vocabulary)."""
    if head.softcap is None:
        return torch.full_like(products, head.logit_scale)
    return head.logit_scale * (1 - (head.logits(products) / head.softcap).square())


def _fit_scale(along: Tensor, squares: Tensor, chosen: Tensor) -> float:
    """Least squares over all rows, with the ``chosen`` label of each; 0.0 without rows or direction."""
    total = float(_pick(squares, chosen).sum())
    return max(0.0, float(_pick(along, chosen).sum()) / total) if total > 0 else 0.0


def _pick(values: Tensor, chosen: Tensor) -> Tensor:
    """(rows, candidates) and int64 (rows,) to (rows,)."""
    return values.gather(1, chosen[:, None])[:, 0]


def _slabs(weight: Tensor) -> tuple[Tensor, ...]:
    slabs: tuple[Tensor, ...] = weight.split(max(1, _SLAB_VALUES // weight.shape[1]))
    return slabs


def _times(rows: Tensor, weight: Tensor) -> Tensor:
    """float32 (rows, hidden_size) to ``rows W^T`` (rows, vocabulary)."""
    return torch.cat([rows @ slab.float().T for slab in _slabs(weight)], dim=1)


def _weighted_rows(shares: Tensor, weight: Tensor) -> Tensor:
    """float32 (rows, vocabulary) to ``shares W`` (rows, hidden_size)."""
    total = torch.zeros(len(shares), weight.shape[1], device=weight.device)
    start = 0
    for slab in _slabs(weight):
        total += shares[:, start : start + len(slab)] @ slab.float()
        start += len(slab)
    return total
