"""Where autograd meets the wire: the exchange of one micro-batch's live groups with a device.

::

    x ── Fork ──┬──────────── frozen linear ────────── + ── y   forward: what the device needs is sent, the frozen
                ├──────────── frozen linear ────────── + ── y   products are computed while it works, then its outputs
                │                                      │        are awaited
                └ Pack ─ project ─ AwaitInputGrad ┐  Unpack
                                  │               ┊    │        backward: of the nodes that are ready autograd runs the
                                  ▼               ┊  expand     one created last, SendGrads; then the frozen products;
                          to the device           ┊    │        then AwaitInputGrad waits for the gradient of what was
                                                 SendGrads      sent, and Fork adds it to the rest
                                                     ▲
                                          outputs of the device

``project`` and ``expand`` are the adapters' kind's own (``kinds.py``); for LoRA they change nothing. What ``expand``
gives is multiplied by its module's gain.

Whose target modules ask for it, and how, is ``target_modules.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel
from dlora.protocol.groups import GroupSpec

from .kinds import Site
from .target_modules import GroupRunner, among_all, chosen_rows


class RowRunner(GroupRunner):
    """Runs the groups of a session's micro-batch, whose adapters act at the rows that cross.

    Args:
        groups: the session's exchange groups; sites: one each.
        live: groups that exchange.
        given: groups that are applied here, with their parameters as ``Site.compute_outputs`` takes them.
        rows: int64 (rows,), where each row that crosses lies in the flattened padded batch; None where all cross as
            they lie.
        graded: as ``GroupRunner`` has it.
    """

    def __init__(
        self,
        base: BaseModel,
        groups: Sequence[GroupSpec],
        sites: Sequence[Site],
        *,
        live: Collection[int],
        given: Mapping[int, Sequence[Tensor]],
        rows: Tensor | None,
        graded: Tensor | None = None,
    ) -> None:
        super().__init__(base, groups, (*live, *given), graded=graded)
        self.sites = sites
        self.rows = rows
        self._given = given

    @abstractmethod
    def exchange(self, group: int, x: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
        """The frozen products of a live group, and one delta for each, (rows, out_features); None: there are none."""

    def run_group(self, group: int, x: Tensor) -> Sequence[Tensor]:
        """What a group's target modules give: their frozen products and the deltas."""
        frozen, deltas = self._apply_given(group, x) if group in self._given else self.exchange(group, x)
        if deltas is None:
            return frozen
        targets = self._groups[group].targets
        return [
            torch.add(output, self._unpack(delta, output), alpha=target.gain)
            for output, delta, target in zip(frozen, deltas, targets, strict=True)
        ]

    def pack(self, padded: Tensor) -> Tensor:
        """(batch, length, width) or (batch * length, width) to the rows that cross, (rows, width)."""
        if not torch.is_grad_enabled():  # what autograd keeps takes longer than the rest, at a few rows
            return chosen_rows(padded, self.rows)
        packed: Tensor = _Pack.apply(padded, self)
        return packed

    def _unpack(self, delta: Tensor, output: Tensor) -> Tensor:
        """Rows that crossed, where they lie in ``output``."""
        if not torch.is_grad_enabled():
            return among_all(delta.to(output.dtype), self.rows, output.shape)
        unpacked: Tensor = _Unpack.apply(delta, self, output.shape, output.dtype)
        return unpacked

    def _apply_given(self, group: int, x: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """As ``exchange``, with what the device has given in its place."""
        deltas = self._given_deltas(group, x)
        return self.run_frozen(group, x), deltas

    def _given_deltas(self, group: int, x: Tensor) -> Sequence[Tensor]:
        """One for each target module of a group that is applied here, (rows, out_features)."""
        site = self.sites[group]
        return site.expand(site.compute_outputs(site.project(self.pack(x)), self._given[group]))


class GroupDevice(Protocol):
    """The device of a micro-batch, as the exchange sees it. Tensors have the rows that cross: (rows, width)."""

    def send_input(self, group: int, x: Tensor) -> None: ...
    def receive_outputs(self, group: int, torch_device: torch.device) -> list[Tensor]: ...
    def send_grads(self, group: int, grads: Sequence[Tensor], *, answer: bool) -> None: ...
    def receive_input_grad(self, group: int, torch_device: torch.device) -> Tensor: ...


class MicroBatchExchange(RowRunner):
    """The exchange of one micro-batch.

    Args:
        live: groups that exchange; trained: those of them whose adapters want gradients.
        given, rows, graded: as ``RowRunner`` has them.

    Attributes:
        gradients: after the forward pass, how many groups will have their outputs' gradients sent.
    """

    def __init__(
        self,
        device: GroupDevice,
        base: BaseModel,
        groups: Sequence[GroupSpec],
        sites: Sequence[Site],
        *,
        live: Collection[int],
        trained: Collection[int],
        given: Mapping[int, Sequence[Tensor]],
        rows: Tensor | None,
        graded: Tensor | None = None,
    ) -> None:
        super().__init__(base, groups, sites, live=live, given=given, rows=rows, graded=graded)
        self.device = device
        self.gradients = 0
        self._trained = trained

    def exchange(self, group: int, x: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The frozen products, and the deltas that the device gives."""
        site = self.sites[group]
        joined, tap = _Fork.apply(x) if x.requires_grad else (x, x)
        sent = site.project(self.pack(tap))
        self.device.send_input(group, sent.detach())
        if sent.requires_grad:
            sent = _AwaitInputGrad.apply(sent, self, group)
        frozen = self.run_frozen(group, joined)
        outputs = self.device.receive_outputs(group, frozen[0].device)
        if torch.is_grad_enabled() and (sent.requires_grad or group in self._trained):
            # The anchor makes the outputs part of the graph where nothing below them is.
            anchor = torch.ones((), requires_grad=True)
            outputs = list(_SendGrads.apply(self, group, anchor, sent, *outputs))
            self.gradients += 1
        return frozen, site.expand(outputs)


class _Fork(torch.autograd.Function):
    """x, twice: for the frozen products and for the device. Its backward adds what both give, in this order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, tap: Tensor) -> Tensor:
        return grad + tap


class _AwaitInputGrad(torch.autograd.Function):
    """What was sent to the device; its backward waits for the device's gradient of it."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, exchange: MicroBatchExchange, group: int) -> Tensor:
        ctx.set_materialize_grads(False)  # SendGrads gives none: it only comes first
        ctx.exchange, ctx.group, ctx.device, ctx.dtype = exchange, group, sent.device, sent.dtype
        return sent.view_as(sent)

    @staticmethod
    def backward(ctx: Any, _: None) -> tuple[Tensor, None, None]:
        exchange: MicroBatchExchange = ctx.exchange
        return exchange.device.receive_input_grad(ctx.group, ctx.device).to(ctx.dtype), None, None


class _SendGrads(torch.autograd.Function):
    """The outputs as they came; its backward sends their gradients and waits for nothing."""

    @staticmethod
    def forward(
        ctx: Any, exchange: MicroBatchExchange, group: int, anchor: Tensor, sent: Tensor, *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.group, ctx.inputs = exchange, group, 4 + len(outputs)
        ctx.answer = sent.requires_grad
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        exchange: MicroBatchExchange = ctx.exchange
        exchange.device.send_grads(ctx.group, grads, answer=ctx.answer)
        # None for `sent` too: it stands among the inputs only so that AwaitInputGrad cannot run before SendGrads has.
        return (None,) * ctx.inputs


class _Pack(torch.autograd.Function):
    """The rows that cross."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runner: RowRunner) -> Tensor:
        ctx.rows, ctx.shape, ctx.dtype = runner.rows, x.shape, x.dtype
        return chosen_rows(x, runner.rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return among_all(grad.contiguous().to(ctx.dtype), ctx.rows, ctx.shape), None


class _Unpack(torch.autograd.Function):
    """Rows that crossed, where they lie in the batch."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, runner: RowRunner, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        ctx.rows, ctx.dtype = runner.rows, packed.dtype
        return among_all(packed.to(dtype), runner.rows, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return chosen_rows(grad, ctx.rows).to(ctx.dtype), None, None, None
