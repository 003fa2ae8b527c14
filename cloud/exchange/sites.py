"""Where autograd meets the wire: the exchange of one micro-batch's live groups with a device.

::

    x ──────────── Join ──┬── frozen linear ──── + ── y        forward: x is posted, the frozen products are
    │                     ├── frozen linear ──── + ── y        computed while the device works, then its deltas
    │                     ┊                      │             are awaited and added
    └─ to the device ──── Post ── deltas ────────┘
                                                               backward: Post's node is the youngest, so it runs
                                                               first and posts the deltas' gradients; the frozen
                                                               products run; Join runs last and adds the device's dx

No model-specific code: each target module's ``forward`` is wrapped once, and asks a thread-local for the
micro-batch that runs in this thread. Without one, or for a group that is not live, it is the base model's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel
from dlora.protocol.groups import GroupSpec


class Channel(Protocol):
    """The device, as the exchange sees it. Tensors are packed: (tokens, width)."""

    def send_input(self, group: int, x: Tensor) -> None: ...
    def receive_deltas(self, group: int) -> list[Tensor]: ...
    def send_grads(self, group: int, grads: Sequence[Tensor], *, answer: bool) -> None: ...
    def receive_input_grad(self, group: int) -> Tensor: ...


class MicroBatchExchange:
    """The exchange of one micro-batch.

    Args:
        groups: the session's exchange groups.
        live: groups that exchange; trained: those of them whose adapters want gradients.
        rows: int64 (tokens,), where each packed token lies in the flattened padded batch; None without padding.

    Attributes:
        gradients: after the forward pass, how many groups will have their deltas' gradients sent.
    """

    def __init__(
        self,
        channel: Channel,
        base: BaseModel,
        groups: Sequence[GroupSpec],
        *,
        live: Collection[int],
        trained: Collection[int],
        rows: Tensor | None,
    ) -> None:
        self.channel = channel
        self.rows = rows
        self.gradients = 0
        self._groups = groups
        self._trained = trained
        self._base = base
        self._group_of = {target.name: index for index in live for target in groups[index].targets}
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def run_target(self, name: str, x: Tensor) -> Tensor | None:
        """The output of a target module, or None where its group does not exchange."""
        group = self._group_of.get(name)
        if group is None:
            return None
        if group not in self._inputs:
            self._run_group(group, x)
        if self._inputs[group] is not x:
            raise RuntimeError(f"{name} did not get its group's input: the base model changed since it was traced")
        return self._outputs.pop(name)

    def _run_group(self, group: int, x: Tensor) -> None:
        self._inputs[group] = x
        self.channel.send_input(group, self.pack(x.detach()))
        joined: Tensor = _Join.apply(x, self, group) if x.requires_grad else x
        targets = self._groups[group].targets
        frozen = [_original_forwards(self._base)[target.name](joined) for target in targets]
        deltas = [
            self.unpack(delta, like) for delta, like in zip(self.channel.receive_deltas(group), frozen, strict=True)
        ]
        if torch.is_grad_enabled() and (x.requires_grad or group in self._trained):
            # The anchor makes the deltas part of the graph where nothing below them is.
            anchor = torch.ones((), requires_grad=True)
            deltas = list(_Post.apply(self, group, anchor, joined, *deltas))
            self.gradients += 1
        for target, output, delta in zip(targets, frozen, deltas, strict=True):
            self._outputs[target.name] = output + delta

    def forget(self) -> None:
        """Drop the forward pass's tensors.

        They hold the graph, whose nodes hold this exchange: a cycle through autograd's C++ that Python's collector
        cannot see, and so a leak of every step's activations.
        """
        self._inputs.clear()
        self._outputs.clear()

    def pack(self, padded: Tensor) -> Tensor:
        """(batch, length, width) or (batch * length, width) to (tokens, width)."""
        flat = padded.reshape(-1, padded.shape[-1])
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """(tokens, width) to the shape and dtype of ``like``, with zeros for padding."""
        packed = packed.to(like.dtype)
        if self.rows is None:
            return packed.view(like.shape)
        full = torch.zeros_like(like)
        full.view(-1, like.shape[-1]).index_copy_(0, self.rows, packed)
        return full


class _Join(torch.autograd.Function):
    """Identity; its backward waits for the device's dx and adds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: MicroBatchExchange, group: int) -> Tensor:
        ctx.exchange, ctx.group = exchange, group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        exchange: MicroBatchExchange = ctx.exchange
        dx = exchange.channel.receive_input_grad(ctx.group)
        return grad + exchange.unpack(dx, grad.contiguous()), None, None


class _Post(torch.autograd.Function):
    """The deltas as they came; its backward posts their gradients and waits for nothing."""

    @staticmethod
    def forward(
        ctx: Any, exchange: MicroBatchExchange, group: int, anchor: Tensor, joined: Tensor, *deltas: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.group, ctx.inputs = exchange, group, 4 + len(deltas)
        ctx.answer = joined.requires_grad
        return tuple(delta.view_as(delta) for delta in deltas)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        exchange: MicroBatchExchange = ctx.exchange
        exchange.channel.send_grads(ctx.group, [exchange.pack(grad) for grad in grads], answer=ctx.answer)
        # None for `joined` too: it stands among the inputs only so that Join cannot run before Post has.
        return (None,) * ctx.inputs


_running = threading.local()


@contextmanager
def exchanging(exchange: MicroBatchExchange) -> Iterator[None]:
    """Within, target modules that run in this thread exchange."""
    _running.exchange = exchange
    try:
        yield
    finally:
        _running.exchange = None
        exchange.forget()


_FORWARDS = "_dlora_original_forwards"


def install(base: BaseModel) -> None:
    """Wrap the target modules of a base model, once. Raises ``ValueError`` if a base parameter requires grad."""
    for name, parameter in base.model.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"base parameter {name} requires grad")
    if hasattr(base.model, _FORWARDS):
        return
    originals: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, target in base.targets.items():
        originals[name] = target.module.forward
        target.module.forward = _wrap(name, target.module.forward)
    # Not through nn.Module's __setattr__: this is no submodule.
    object.__setattr__(base.model, _FORWARDS, originals)


def _original_forwards(base: BaseModel) -> dict[str, Callable[[Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor], Tensor]] = getattr(base.model, _FORWARDS)
    return found


def _wrap(name: str, original: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        exchange: MicroBatchExchange | None = getattr(_running, "exchange", None)
        output = exchange.run_target(name, x) if exchange is not None else None
        return original(x) if output is None else output

    return forward
