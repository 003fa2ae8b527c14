"""A model to generate with whose last blocks run here, with adapters in them, and keep their keys and values here.

What comes into the first of these for new tokens a source gives: in one round trip a server that keeps the others' keys
and values, or the embeddings, where all blocks run here. Adapters and logits never leave.
"""

from __future__ import annotations

import time

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.wire.usage import WireCounters
from dlora.protocol import messages as m
from dlora.protocol.errors import NonFiniteError
from dlora.protocol.tensors import FloatArray

from .decode_blocks import DecodeBlocks
from .decode_parts import check_room
from .ends import Head, LongArray
from .extension import Extension, Guesses
from .source import TokenSource


class DeviceGenerator:
    """Goes on from the tokens that it had last, as ``SplitModel`` does.

    Args:
        blocks: with the adapters.
        source: of what comes into the first of them.
        context_length: the most tokens of a text; fewer where source or blocks have no room for as many.
        invocation: the tokens from which on adapters act; none: everywhere.

    Attributes:
        compute_seconds: that this device has computed so far, without the embedding.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        blocks: DecodeBlocks,
        source: TokenSource,
        *,
        context_length: int,
        invocation: tuple[int, ...] = (),
    ) -> None:
        self.invocation = invocation
        self.compute_seconds = 0.0
        self._blocks = blocks
        self._source = source
        self._context_length = context_length
        self._head = Head(bundle, engine)
        self._last: list[FloatArray] = []  # last hidden states of the last tokens of this call
        self._acts_from = self._count = 0  # likewise

    @property
    def counters(self) -> WireCounters:
        """What crossed so far."""
        return self._source.crossed.counters

    @property
    def context_limit(self) -> int:
        """The most tokens of a context."""
        return min(self._context_length, self._source.context_limit, self._blocks.limit)

    @property
    def can_guess(self) -> bool:
        """Whether a server guesses tokens that may come next."""
        return self._source.can_guess

    @property
    def length(self) -> int:
        """How many tokens the blocks have had, for the source."""
        return self._blocks.length

    def extend(self, ids: LongArray, known: int, acts_from: int, count: int, guesses: Guesses) -> Extension:
        """As ``SplitModel`` has it."""
        check_room(ids, self.context_limit)
        self._blocks.crop(known)
        self._last.clear()
        self._acts_from, self._count = acts_from, count
        fed = self._source.feed(ids, count, self, guesses.drafts)
        started = time.perf_counter()
        logits = self._head.logits(np.concatenate(self._last)[-count - len(fed.drafts) :])
        self.compute_seconds += time.perf_counter() - started
        if not np.isfinite(logits).all():
            text = "the logits are not finite: the adapter is of a run that diverged; train it anew with a lower --lr"
            raise NonFiniteError(text)
        return Extension(logits, fed.drafts, fed.held, fed.drafts_s)

    def append(self, hidden_states: FloatArray) -> None:
        """Run the blocks on the next tokens, for the source; the first go through without adapters."""
        started = time.perf_counter()
        without = min(max(0, self._acts_from - self._blocks.length), len(hidden_states))
        for rows, acts in ((hidden_states[:without], False), (hidden_states[without:], True)):
            if len(rows):
                wanted = self._count + m.MAX_DRAFT
                self._last.append(self._blocks.append(rows, with_lora=acts)[-wanted:].copy())
        self.compute_seconds += time.perf_counter() - started

    def release_weights(self) -> None:
        """Let the pages of the two ends' weights go, which ``extend`` keeps for the next token."""
        self._head.release()
