"""Where hidden states come from that go into the first block on the device: a server, a cache, or the embeddings."""

from __future__ import annotations

from typing import Protocol

from dlora.edge.data.batches import MicroBatch
from dlora.edge.wire.usage import Crossed
from dlora.protocol.tensors import FloatArray

from .ends import LongArray
from .kept_outputs_cache import KeptOutputsCache


class HiddenStateSource(Protocol):
    """Hidden states of whole texts."""

    @property
    def kept(self) -> KeptOutputsCache | None:
        """Where what comes out of blocks that are not trained is kept; None: nowhere."""

    @property
    def crossed(self) -> Crossed:
        """What asking took so far."""

    def hidden_states(self, batch: MicroBatch) -> FloatArray:
        """Of all texts of a micro-batch, float32 (tokens, width)."""


class TokenSink(Protocol):
    """Blocks that go on from the tokens that they have had."""

    @property
    def length(self) -> int:
        """How many these are."""

    def append(self, hidden_states: FloatArray) -> None:
        """Take the next ones, float32 (tokens, width)."""


class TokenSource(Protocol):
    """Hidden states of the tokens of one text that grows."""

    @property
    def crossed(self) -> Crossed:
        """What asking took so far."""

    @property
    def context_limit(self) -> int:
        """The most tokens of a text."""

    def feed(self, ids: LongArray, count: int, blocks: TokenSink) -> int:
        """Give ``blocks`` what they have not had of a text, int64 (tokens,), of which ``count`` are wanted for certain.

        Returns how many of its tokens need not cross again. Raises ``DataError`` for a text that is too long.
        """
