"""What generation needs of a model, wherever its blocks are."""

from __future__ import annotations

from typing import Protocol

from dlora.edge.wire.usage import WireCounters
from dlora.protocol.tensors import FloatArray

from .ends import LongArray


class GeneratingModel(Protocol):
    """A model that goes on from the tokens that it had last: those of one context."""

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens from which on the adapters act; none: everywhere."""

    @property
    def counters(self) -> WireCounters:
        """What crossed so far."""

    @property
    def context_limit(self) -> int:
        """The most tokens of a context."""

    def extend(self, ids: LongArray, known: int, acts_from: int, count: int) -> tuple[FloatArray, int]:
        """Logits of what follows the last tokens of a text, and how many of its tokens the server held already.

        Args:
            ids: int64 (tokens,), the whole text so far.
            known: how many of its first tokens are those that the model had last, in the same way; at most all but
                ``count``. They need not cross again where they are still held.
            acts_from: the row from which on the adapters act.

        Returns: float32 (count, vocabulary), and a number of tokens, 0 where the server has lost what it held.

        Raises what ``Connection`` raises, and ``DataError`` for a text that is longer than ``context_limit``.
        """

    def release_weights(self) -> None:
        """Let the pages of weights go, which ``extend`` keeps for the next token."""
