"""What a run needs of a model, wherever its blocks are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dlora.edge.data.batches import MicroBatch
from dlora.edge.wire.usage import WireCounters
from dlora.protocol.tensors import FloatArray

from .ends import LongArray, LossGradient


class TrainableModel(Protocol):
    """Forward, backward and evaluation of micro-batches, with the adapters as they are."""

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens from which on the adapters act; none: everywhere."""

    @property
    def compute_seconds(self) -> float:
        """Seconds that this device has computed so far."""

    @property
    def counters(self) -> WireCounters:
        """What crossed so far."""

    def cut(self, batch: MicroBatch) -> list[MicroBatch]:
        """``batch`` in parts that can be run at once."""

    def forward_backward(
        self,
        batches: Sequence[MicroBatch],
        *,
        step: int,
        grad_scale: float,
        gradients: Sequence[LossGradient] = (),
    ) -> list[FloatArray]:
        """Train on micro-batches of one step: the cross-entropies of each, (labelled,); gradients go into the
        parameters, those of ``grad_scale`` times their sum, or of each micro-batch's own loss where ``gradients`` has
        its gradient."""

    def evaluate(self, batch: MicroBatch) -> tuple[FloatArray, LongArray]:
        """Losses and likeliest tokens at the labelled positions, (labelled,) each."""
