"""What a model whose last blocks run on the device needs: the hidden states that go into the first of these."""

from __future__ import annotations

from typing import Protocol

from dlora.edge.data.batches import MicroBatch
from dlora.edge.wire.usage import WireUsage
from dlora.protocol.messages import Welcome
from dlora.protocol.tensors import FloatArray

from .held_cache import HeldCache
from .trainable import WireCounters


class HiddenStateSource(Protocol):
    """Hidden states of texts: from a server and what is kept of its answers, or made on the device itself."""

    @property
    def held(self) -> HeldCache | None:
        """Where what comes out of blocks that are not trained is kept; None: nowhere."""

    @property
    def reconnects(self) -> int:
        """As ``Connection`` has it."""

    @property
    def resumed(self) -> int:
        """Likewise."""

    @property
    def counters(self) -> WireCounters:
        """What crossed so far."""

    @property
    def usage(self) -> WireUsage:
        """Likewise, by role, and the time that it took."""

    @property
    def welcome(self) -> Welcome | None:
        """What the server that was asked last said of itself; None where none was."""

    def hidden_states(self, batch: MicroBatch) -> FloatArray:
        """Of all texts of a micro-batch, float32 (tokens, width)."""
