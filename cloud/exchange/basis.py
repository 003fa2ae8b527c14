"""The base model's own micro-batches, from whose gradients the frozen A and B of bottleneck adapters are made.

No adapter takes part and nothing crosses at the groups: an ordinary forward and backward pass, in which each group's
gradient goes into its sketch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel
from dlora.protocol.groups import GroupSpec

from .sketch import GroupSketch
from .target_modules import original_forward


class BasisExchange:
    """Runs target modules as the base model does, and sketches their gradients on the way back.

    Args:
        sketches: one a group.
        rows: int64 (rows,), where each row at which adapters act lies in the flattened padded batch; None: all.
    """

    def __init__(
        self, base: BaseModel, groups: Sequence[GroupSpec], sketches: Sequence[GroupSketch], rows: Tensor | None
    ) -> None:
        self.rows = rows
        self._base = base
        self._places = {name: (sketch, first) for name, sketch, first in _places(groups, sketches)}

    def run_target(self, name: str, x: Tensor) -> Tensor | None:
        """The output of a target module, or None where nothing is learnt of it."""
        if name not in self._places:
            return None
        sketch, first = self._places[name]
        output = original_forward(self._base, name)(x)
        # The anchor begins the graph at the lowest group: nothing below it needs a gradient.
        anchor = torch.ones((), requires_grad=True)
        sketched: Tensor = _Sketched.apply(output, x.detach(), anchor, self, sketch, first)  # type: ignore[no-untyped-call]
        return sketched

    def forget(self) -> None:
        """Nothing is kept of a forward pass."""


def _places(groups: Sequence[GroupSpec], sketches: Sequence[GroupSketch]) -> Iterator[tuple[str, GroupSketch, int]]:
    """Each target module's name, its group's sketch, and where its outputs begin among the group's."""
    for group, sketch in zip(groups, sketches, strict=True):
        first = 0
        for target in group.targets:
            yield target.name, sketch, first
            first += target.out_features


class _Sketched(torch.autograd.Function):
    """A target module's output as it is; its backward adds to a sketch, and hands the gradient on."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, exchange: BasisExchange, sketch: GroupSketch, first: int
    ) -> Tensor:
        ctx.x, ctx.exchange, ctx.sketch, ctx.first = x, exchange, sketch, first
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x, ctx.x = ctx.x, None
        flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, grad)]
        if ctx.exchange.rows is not None:
            flat = [tensor.index_select(0, ctx.exchange.rows) for tensor in flat]
        ctx.sketch.add(*flat, ctx.first)
        return grad, None, None, None, None, None
