"""Runs a base model's target modules in another way than their own, for as long as one micro-batch takes.

No model-specific code: each target module's ``forward`` is wrapped once, and asks a thread-local for the micro-batch
that runs in this thread. Without one, or where that has nothing to say of the module, it is the base model's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from dlora.cloud.model.base_model import BaseModel


class TargetRunner(Protocol):
    """Who runs target modules in place of their own ``forward``."""

    def run_target(self, name: str, x: Tensor) -> Tensor | None:
        """The output of a target module, or None for the base model's own."""

    def forget(self) -> None:
        """Drop the forward pass's tensors."""


_running = threading.local()


@contextmanager
def exchanging(exchange: TargetRunner) -> Iterator[None]:
    """Within, ``exchange`` runs the target modules that are called in this thread."""
    _running.exchange = exchange
    try:
        yield
    finally:
        _running.exchange = None
        exchange.forget()


class _Wrapped:
    """A target module's ``forward`` that exchanges where a micro-batch runs in this thread, and the original."""

    def __init__(self, name: str, original: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self.original = original

    def __call__(self, x: Tensor) -> Tensor:
        exchange: TargetRunner | None = getattr(_running, "exchange", None)
        output = exchange.run_target(self.name, x) if exchange is not None else None
        return self.original(x) if output is None else output


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
