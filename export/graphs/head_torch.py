"""The head's training graphs as torch functions with explicit gradients, for ExecuTorch, and what all must compute, by
autograd. ``head.py`` has the formulas and the ONNX text.

The label's logit comes from its row of the weight: nothing scatters or gathers along the vocabulary. The loop over
slabs is unrolled, for ExecuTorch has none, and its planner gives all slabs the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dlora.cloud.model.base_model import HeadEnd
from dlora.protocol.manifest import GraphKind

from .arrays import Arrays, Inputs, to_floats
from .stored_weight import wide

if TYPE_CHECKING:
    from .head import HeadShape

REFERENCE_SLAB_VALUES: Final = 1 << 24  # of a weight: 128 MB in float64
SLABS: Final = 24  # each is ten operators, and export takes a second for thirty
LEAST_ROWS: Final = 512  # of the vocabulary; less would be work for the interpreter only


@dataclass(frozen=True)
class _Weights:
    """The weight (rows, hidden) as it is stored, all of it or a slab, and what else there is of each row (rows,)."""

    head: HeadShape
    weight: Tensor
    row_scales: Tensor | None
    group_scales: Tensor | None
    bias: Tensor | None

    @classmethod
    def split(cls, head: HeadShape, tensors: tuple[Tensor, ...]) -> tuple[_Weights, tuple[Tensor, ...]]:
        """Of a graph's inputs the weights and those after them."""
        weight, *rest = tensors
        row_scales = rest.pop(0) if head.dtype == "int8" else None
        group_scales = rest.pop(0) if head.dtype == "int4" else None
        bias = rest.pop(0) if head.bias else None
        return cls(head, weight, row_scales, group_scales, bias), tuple(rest)

    def slabs(self) -> Iterator[tuple[int, _Weights]]:
        """Where each slab of the vocabulary begins, and its weights."""
        size = max(LEAST_ROWS, -(-self.head.vocabulary_size // SLABS))
        for start in range(0, self.head.vocabulary_size, size):
            rows = slice(start, min(start + size, self.head.vocabulary_size))
            others = (self.row_scales, self.group_scales, self.bias)
            parts = (None if part is None else part[rows] for part in others)
            yield start, _Weights(self.head, self.weight[rows], *parts)

    def wide(self) -> Tensor:
        """float32 (rows, hidden), without row scales."""
        return wide(self.weight, self.group_scales)

    def logits(self, hidden: Tensor, wide: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (rows, slab) of one slab, given its weight in float32, and their slope where there is a cap."""
        raw = nn.functional.linear(hidden, wide)
        if self.row_scales is not None:
            raw = raw * self.row_scales
        if self.bias is not None:
            raw = raw + self.bias
        return self._capped(raw)

    def _capped(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of ``raw = h W^T + bias``, and what the gradient by raw is to be multiplied with, or None."""
        if self.head.logit_scale != 1.0:
            raw = raw * self.head.logit_scale
        if self.head.softcap is None:
            return raw, None
        tanh = torch.tanh(raw / self.head.softcap)
        return tanh * self.head.softcap, 1.0 - tanh * tanh

    def of_labels(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The labels' own logits (rows, 1), and what each pulls its row with: ``cap' W[label]``, (rows, hidden)."""
        if self.group_scales is not None:
            row = wide(self.weight.index_select(0, labels), self.group_scales.index_select(0, labels))
        else:
            row = nn.functional.embedding(labels, self.weight).float()
        if self.row_scales is not None:
            row = row * self.row_scales.index_select(0, labels).unsqueeze(1)
        raw = (hidden * row).sum(1, keepdim=True)
        if self.bias is not None:
            raw = raw + self.bias.index_select(0, labels).unsqueeze(1)
        logit, slope = self._capped(raw)
        return logit, row if slope is None else row * slope


def head_train(head: HeadShape, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """``losses`` (rows,) and ``grad_hidden_states`` (rows, hidden)."""
    weights, (hidden, labels, grad_scale) = _Weights.split(head, tensors)
    running: tuple[Tensor, Tensor, Tensor] | None = None
    for _, slab in weights.slabs():
        wide = slab.wide()
        logits, slope = slab.logits(hidden, wide)
        top = logits.amax(1, keepdim=True)
        peak = top if running is None else torch.maximum(running[0], top)
        power = torch.exp(logits - peak)
        total = power.sum(1, keepdim=True)
        if slope is not None:
            power = power * slope
        if slab.row_scales is not None:
            power = power * slab.row_scales
        weighted_rows = torch.mm(power, wide)
        if running is not None:
            rescale = torch.exp(running[0] - peak)
            total, weighted_rows = running[1] * rescale + total, running[2] * rescale + weighted_rows
        running = peak, total, weighted_rows
    assert running is not None
    peak, total, weighted_rows = running
    label_logit, label_row = weights.of_labels(hidden, labels)
    losses = (peak + torch.log(total) - label_logit).squeeze(1)
    return losses, (weighted_rows / total - label_row) * (grad_scale * head.logit_scale)


def head_loss(head: HeadShape, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """``losses`` (rows,) and ``predictions`` (rows,), the first of the likeliest tokens."""
    weights, (hidden, labels) = _Weights.split(head, tensors)
    running: tuple[Tensor, Tensor, Tensor] | None = None
    for start, slab in weights.slabs():
        logits, _ = slab.logits(hidden, slab.wide())
        top, place = logits.max(1, keepdim=True)
        peak = top if running is None else torch.maximum(running[0], top)
        total, best = torch.exp(logits - peak).sum(1, keepdim=True), place + start
        if running is not None:
            total = running[1] * torch.exp(running[0] - peak) + total
            # Not equal: of equals the first counts.
            best = torch.where(top > running[0], best, running[2])
        running = peak, total, best
    assert running is not None
    peak, total, best = running
    label_logit, _ = weights.of_labels(hidden, labels)
    return (peak + torch.log(total) - label_logit).squeeze(1), best.squeeze(1)


def head_logits(head: HeadShape, *tensors: Tensor) -> Tensor:
    """``logits`` (rows, vocabulary)."""
    weights, (hidden,) = _Weights.split(head, tensors)
    return torch.cat([slab.logits(hidden, slab.wide())[0] for _, slab in weights.slabs()], 1)


def reference(
    inputs: Inputs, end: HeadEnd, kind: GraphKind, dtype: torch.dtype = torch.float64, stored: bool = False
) -> Arrays:
    """The base model's head: with its own weight, or with the ``stored`` one, which may be rounded.

    Instead of ``predictions`` there are the ``logits`` that they come from.
    """
    hidden = torch.from_numpy(np.array(inputs["hidden_states"])).to(dtype).requires_grad_(kind == "head_train")
    weight = torch.from_numpy(np.asarray(inputs["weight"])) if stored else end.weight
    by_row, by_group = (
        torch.from_numpy(np.asarray(inputs[name])) if stored and name in inputs else None
        for name in ("row_scales", "group_scales")
    )
    size = max(1, REFERENCE_SLAB_VALUES // hidden.shape[1])
    # A weight of 262,144 rows is large enough as it is: it is widened slab by slab, again for the gradient.
    products = [
        checkpoint(
            _product,
            hidden,
            weight[rows],
            *(None if scales is None else scales[rows] for scales in (by_row, by_group)),
            use_reentrant=False,
        )
        for rows in (slice(start, start + size) for start in range(0, len(weight), size))
    ]
    logits = end.logits(torch.cat(products, dim=1))
    if kind == "head_logits":
        return to_floats(logits=logits)
    losses = nn.functional.cross_entropy(
        logits, torch.from_numpy(np.asarray(inputs["labels"], np.int64)), reduction="none"
    )
    if kind == "head_loss":
        return to_floats(losses=losses, logits=logits)
    (grad,) = torch.autograd.grad(losses.sum() * float(inputs["grad_scale"]), hidden)
    return to_floats(losses=losses, grad_hidden_states=grad)


def _product(hidden: Tensor, weight: Tensor, by_row: Tensor | None, by_group: Tensor | None) -> Tensor:
    rows = (weight if by_group is None else wide(weight, by_group)).to(hidden.dtype)
    return hidden @ (rows if by_row is None else rows * by_row.to(hidden.dtype)[:, None]).T
