"""Runs a base model's target modules in another way than their own, for as long as one micro-batch takes.

No model-specific code: each target module's ``forward`` is wrapped once, and asks a thread-local for the micro-batch
that runs in this thread. Without one it is the base model's own.

Where adapters act on the last rows of each text alone, as on answers, nothing that they change reaches a row before
these, and no gradient of such a row leads to an adapter. So the way back through a frozen module takes the others only.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel, TargetModule
from dlora.cloud.model.frozen_product import own_storage
from dlora.protocol.groups import GroupSpec


class TargetRunner(Protocol):
    """Runs target modules in place of their own ``forward``."""

    def run_target(self, name: str, x: Tensor) -> Tensor: ...
    def forget(self) -> None: ...


class GroupRunner(ABC):
    """Runs the target modules of some groups in place of their own ``forward``: all of a group when one is called.

    Args:
        groups: of the session; taking_part: those of them that are run here.
        graded: int64, the rows of the flattened padded batch whose gradients lead to an adapter; None: all.
    """

    def __init__(
        self,
        base: BaseModel,
        groups: Sequence[GroupSpec],
        taking_part: Collection[int],
        *,
        graded: Tensor | None = None,
    ) -> None:
        self._base = base
        self._groups = groups
        self._graded = graded
        self._group_of = {target.name: index for index in taking_part for target in groups[index].targets}
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def runs(self, name: str) -> bool:
        """Whether a target module is one of its groups'."""
        return name in self._group_of

    @abstractmethod
    def run_group(self, group: int, x: Tensor) -> Sequence[Tensor]:
        """What a group's target modules give for ``x``, in their order."""

    def run_target(self, name: str, x: Tensor) -> Tensor:
        """The output of a target module."""
        group = self._group_of.get(name)
        if group is None:
            return self._run_frozen(name, x)
        if group not in self._inputs:
            self._inputs[group] = x
            names = (target.name for target in self._groups[group].targets)
            self._outputs.update(zip(names, self.run_group(group, x), strict=True))
        if self._inputs[group] is not x:
            raise RuntimeError(f"{name} did not get its group's input: the base model changed since it was traced")
        return self._outputs.pop(name)

    def run_frozen(self, group: int, x: Tensor) -> list[Tensor]:
        """What the base model's own modules of a group give."""
        return [self._run_frozen(target.name, x) for target in self._groups[group].targets]

    def _run_frozen(self, name: str, x: Tensor) -> Tensor:
        original, target = original_forward(self._base, name), self._base.targets[name]
        if self._graded is None or not (torch.is_grad_enabled() and x.requires_grad and target.sees_sequences):
            return original(x)
        output: Tensor = _GradedRows.apply(x, original, target, self._graded)  # type: ignore[no-untyped-call]
        return output

    def forget(self) -> None:
        """Drop the forward pass's tensors.

        They hold the graph, whose nodes hold this runner: a cycle through autograd's C++ that Python's collector
        cannot see, and so a leak of every step's activations.
        """
        self._inputs.clear()
        self._outputs.clear()


_running = threading.local()


@contextmanager
def running_targets(runner: TargetRunner | None) -> Iterator[None]:
    """Within, ``runner`` runs the target modules that are called in this thread; None: they run themselves."""
    _running.runner = runner
    try:
        yield
    finally:
        _running.runner = None
        if runner is not None:
            runner.forget()


@dataclass(frozen=True)
class _Wrapped:
    """A target module's ``forward`` that exchanges where a micro-batch runs in this thread, and the original."""

    name: str
    original: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        runner: TargetRunner | None = getattr(_running, "runner", None)
        return self.original(x) if runner is None else runner.run_target(self.name, x)


class _GradedRows(torch.autograd.Function):
    """A frozen module; of its input's gradient only some rows are computed, and the others are zero."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, original: Callable[[Tensor], Tensor], target: TargetModule, graded: Tensor
    ) -> Tensor:
        ctx.shape, ctx.target, ctx.graded = x.shape, target, graded
        return own_storage(original(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        packed = ctx.target.multiply_back(chosen_rows(grad, ctx.graded))
        return among_all(packed, ctx.graded, ctx.shape), None, None, None


def wrap_target_modules(base: BaseModel) -> None:
    """Wrap the target modules of a base model, once. Raises ``ValueError`` if a base parameter requires grad."""
    for name, parameter in base.model.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"base parameter {name} requires grad")
    for name, target in base.targets.items():
        if not isinstance(target.module.forward, _Wrapped):
            target.module.forward = _Wrapped(name, target.module.forward)


def original_forward(base: BaseModel, name: str) -> Callable[[Tensor], Tensor]:
    """The base model's own ``forward`` of a target module."""
    forward = base.targets[name].module.forward
    return forward.original if isinstance(forward, _Wrapped) else forward


def chosen_rows(padded: Tensor, rows: Tensor | None) -> Tensor:
    """(batch, length, width) or (batch * length, width) to the ``rows``, int64, of it, (rows, width); None: all."""
    flat = padded.reshape(-1, padded.shape[-1])
    return flat if rows is None else flat.index_select(0, rows)


def among_all(packed: Tensor, rows: Tensor | None, shape: torch.Size) -> Tensor:
    """(rows, width) to ``shape``, with zeros for all other rows."""
    if rows is None:
        return packed.view(shape)
    full = torch.zeros(shape, dtype=packed.dtype, device=packed.device)
    full.view(-1, shape[-1]).index_copy_(0, rows, packed)
    return full
