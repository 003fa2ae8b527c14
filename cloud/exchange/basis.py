"""The base model's own micro-batches, from which the frozen A and B of bottleneck adapters are made.

No adapter takes part and nothing crosses at the groups: an ordinary forward and backward pass, in which what goes
into a group's modules, and the gradients of what comes out of them, go into its sketch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel
from dlora.protocol.groups import GroupSpec

from .sketch import GroupSketch
from .target_modules import GroupRunner, chosen_rows


class BasisPass(GroupRunner):
    """Runs target modules as the base model does, and sketches their inputs and gradients on the way back.

    Args:
        sketches: one a group.
        rows: int64 (rows,), where each row at which adapters act lies in the flattened padded batch; None: all.
        graded: as ``GroupRunner`` has it.
    """

    def __init__(
        self,
        base: BaseModel,
        groups: Sequence[GroupSpec],
        sketches: Sequence[GroupSketch],
        rows: Tensor | None,
        graded: Tensor | None = None,
    ) -> None:
        super().__init__(base, groups, range(len(groups)), graded=graded)
        self.rows = rows
        self._sketches = sketches

    def run_group(self, group: int, x: Tensor) -> Sequence[Tensor]:
        # The anchor begins the graph at the lowest group: nothing below it needs a gradient.
        anchor = torch.ones((), requires_grad=True)
        # A biased linear gives a view, which ``mark_dirty`` takes none of.
        given = [output.clone() if output._is_view() else output for output in self.run_frozen(group, x)]
        outputs: Sequence[Tensor] = _Sketched.apply(self, group, x.detach(), anchor, *given)  # type: ignore[no-untyped-call]
        return outputs

    def sketch(self, group: int, x: Tensor, grads: Sequence[Tensor]) -> None:
        """Add what one group's modules got and the gradients of what they gave, as they lie in the padded batch."""
        flat = [chosen_rows(tensor, self.rows) for tensor in (x, *grads)]
        stacked = torch.cat(flat[1:], dim=1)
        widths = [grad.shape[-1] for grad in grads]
        # As adapters have them: gradients of what is multiplied by a gain are as many times as large.
        for part, target in zip(stacked.split(widths, dim=1), self._groups[group].targets, strict=True):
            part.mul_(target.gain)
        self._sketches[group].add(flat[0], stacked)


class _Sketched(torch.autograd.Function):
    """What a group's modules gave, as it is; its backward adds to a sketch, and hands the gradients on."""

    @staticmethod
    def forward(
        ctx: Any, runner: BasisPass, group: int, x: Tensor, anchor: Tensor, *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.runner, ctx.group, ctx.x = runner, group, x
        ctx.mark_dirty(*outputs)  # as they are, and not views: some models change them in place
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, ctx.x = ctx.x, None
        ctx.runner.sketch(ctx.group, x, grads)
        return None, None, None, None, *grads
