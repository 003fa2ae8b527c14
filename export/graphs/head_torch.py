"""The head's training graphs as torch modules with explicit gradients, for ExecuTorch, and what all must compute, by
autograd. ``head.py`` has the formulas and the ONNX text.

Neither the logits nor a widened weight ever exist whole. The vocabulary is walked over in slabs: each is widened,
multiplied, and folded into a running softmax, that of online softmax (Milakov and Gimelshein, arXiv 1805.02867) with
the gradient's product folded in, as cut cross-entropy does it (Wijmans et al., arXiv 2411.09009)::

    peak'   = max(peak, max(logits of the slab))
    total'  = total  * exp(peak - peak') + sum(p)                p = exp(logits of the slab - peak')
    weighted_rows' = weighted_rows * exp(peak - peak') + (p * cap') W_slab

so that loss = peak + log(total) - logit of the label, and dh = (weighted_rows / total - cap' W[label]) times the
scales. The label's logit comes from its row of the weight: nothing scatters or gathers along the vocabulary. The loop
is unrolled, for ExecuTorch has none, and its planner gives all slabs the same memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dlora.cloud.model.base_model import HeadEnd
from dlora.protocol.manifest import GraphKind

from .arrays import Arrays, Inputs, to_floats

if TYPE_CHECKING:
    from .head import HeadShape

REFERENCE_SLAB_VALUES: Final = 1 << 24  # of a weight: 128 MB in float64
SLABS: Final = 24  # each is ten operators, and export takes a second for thirty
LEAST_ROWS: Final = 512  # of the vocabulary; less would be work for the interpreter only


class _Head(nn.Module):
    """What the three graphs share. Weights come as ``weight``, then ``row_scales`` and ``bias`` where there are any."""

    def __init__(self, head: HeadShape) -> None:
        super().__init__()
        self.head = head
        size = max(LEAST_ROWS, -(-head.vocabulary_size // SLABS))
        self.slabs = [
            (start, min(start + size, head.vocabulary_size)) for start in range(0, head.vocabulary_size, size)
        ]

    def split(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, ...]]:
        """The weight, its row scales and bias, and the inputs after them."""
        weight, *rest = tensors
        row_scales = rest.pop(0) if self.head.dtype == "int8" else None
        bias = rest.pop(0) if self.head.bias else None
        return weight, row_scales, bias, tuple(rest)

    def wide(self, weight: Tensor, start: int, end: int) -> Tensor:
        """A slab of the weight in float32, (end - start, hidden)."""
        return weight[start:end].float()

    def logits(
        self, wide: Tensor, row_scales: Tensor | None, bias: Tensor | None, hidden: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (rows, slab) of one slab, and their slope where there is a cap."""
        raw = nn.functional.linear(hidden, wide)
        if row_scales is not None:
            raw = raw * row_scales
        if bias is not None:
            raw = raw + bias
        return self.capped(raw)

    def capped(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of ``raw = h W^T + bias``, and what the gradient by raw is to be multiplied with, or None."""
        if self.head.logit_scale != 1.0:
            raw = raw * self.head.logit_scale
        if self.head.softcap is None:
            return raw, None
        tanh = torch.tanh(raw / self.head.softcap)
        return tanh * self.head.softcap, 1.0 - tanh * tanh

    def of_labels(
        self, weight: Tensor, row_scales: Tensor | None, bias: Tensor | None, hidden: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The labels' own logits (rows, 1), and what each pulls its row with: ``cap' W[label]``, (rows, hidden)."""
        row = nn.functional.embedding(labels, weight).float()
        if row_scales is not None:
            row = row * row_scales.index_select(0, labels).unsqueeze(1)
        raw = (hidden * row).sum(1, keepdim=True)
        if bias is not None:
            raw = raw + bias.index_select(0, labels).unsqueeze(1)
        logit, slope = self.capped(raw)
        return logit, row if slope is None else row * slope


class HeadTrain(_Head):
    """``losses`` (rows,) and ``grad_hidden_states`` (rows, hidden)."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        weight, row_scales, bias, (hidden, labels, grad_scale) = self.split(tensors)
        running: tuple[Tensor, Tensor, Tensor] | None = None
        for start, end in self.slabs:
            wide = self.wide(weight, start, end)
            scales = None if row_scales is None else row_scales[start:end]
            logits, slope = self.logits(wide, scales, None if bias is None else bias[start:end], hidden)
            top = logits.amax(1, keepdim=True)
            peak = top if running is None else torch.maximum(running[0], top)
            power = torch.exp(logits - peak)
            total = power.sum(1, keepdim=True)
            if slope is not None:
                power = power * slope
            if scales is not None:
                power = power * scales
            weighted_rows = torch.mm(power, wide)
            if running is not None:
                rescale = torch.exp(running[0] - peak)
                total, weighted_rows = running[1] * rescale + total, running[2] * rescale + weighted_rows
            running = peak, total, weighted_rows
        assert running is not None
        peak, total, weighted_rows = running
        label_logit, label_row = self.of_labels(weight, row_scales, bias, hidden, labels)
        losses = (peak + torch.log(total) - label_logit).squeeze(1)
        return losses, (weighted_rows / total - label_row) * (grad_scale * self.head.logit_scale)


class HeadLoss(_Head):
    """``losses`` (rows,) and ``predictions`` (rows,), the first of the likeliest tokens."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        weight, row_scales, bias, (hidden, labels) = self.split(tensors)
        running: tuple[Tensor, Tensor, Tensor] | None = None
        for start, end in self.slabs:
            scales = None if row_scales is None else row_scales[start:end]
            wide = self.wide(weight, start, end)
            logits, _ = self.logits(wide, scales, None if bias is None else bias[start:end], hidden)
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
        label_logit, _ = self.of_labels(weight, row_scales, bias, hidden, labels)
        return (peak + torch.log(total) - label_logit).squeeze(1), best.squeeze(1)


class HeadLogits(_Head):
    """``logits`` (rows, vocabulary)."""

    def forward(self, *tensors: Tensor) -> Tensor:
        weight, row_scales, bias, (hidden,) = self.split(tensors)
        parts = []
        for start, end in self.slabs:
            scales = None if row_scales is None else row_scales[start:end]
            wide = self.wide(weight, start, end)
            parts.append(self.logits(wide, scales, None if bias is None else bias[start:end], hidden)[0])
        return torch.cat(parts, 1)


def reference(
    inputs: Inputs, end: HeadEnd, kind: GraphKind, dtype: torch.dtype = torch.float64, stored: bool = False
) -> Arrays:
    """The base model's head: with its own weight, or with the ``stored`` one, which may be rounded.

    Instead of ``predictions`` there are the ``logits`` that they come from.
    """
    hidden = torch.from_numpy(np.array(inputs["hidden_states"])).to(dtype).requires_grad_(kind == "head_train")
    weight = torch.from_numpy(np.asarray(inputs["weight"])) if stored else end.weight
    scales = torch.from_numpy(np.asarray(inputs["row_scales"])) if stored and "row_scales" in inputs else None
    size = max(1, REFERENCE_SLAB_VALUES // weight.shape[1])
    # A weight of 262,144 rows is large enough as it is: it is widened slab by slab, again for the gradient.
    products = [
        checkpoint(
            _product,
            hidden,
            weight[start : start + size],
            None if scales is None else scales[start : start + size],
            use_reentrant=False,
        )
        for start in range(0, len(weight), size)
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


def _product(hidden: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
    wide = weight.to(hidden.dtype)
    return hidden @ (wide if scales is None else wide * scales.to(hidden.dtype)[:, None]).T
