"""A model to generate with in the mode ``trunk``: the server runs the first blocks, this device the last ones.

Both hold keys and values of their blocks. One round trip gives what comes out of the server's blocks for new tokens,
and the rest is done here, adapters and logits with it. A server that lost its part is given the whole text again; what
this device holds stays.
"""

from __future__ import annotations

import time

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.memory import MANY_TOKENS, release_freed_memory
from dlora.protocol.choices import Send
from dlora.protocol.errors import NonFiniteError
from dlora.protocol.tensors import FloatArray
from dlora.protocol.wire_codecs import Codecs

from .decode_blocks import DecodeBlocks
from .decode_parts import check_room, decode_parts
from .encoder import Encoder, EncodeSession
from .ends import Embedding, Head, LongArray
from .trainable import WireCounters


class TrunkGenerator:
    """As ``GeneratingModel`` has it.

    Args:
        session: one that is open, of the blocks before the first of ``blocks``, with a context.
        blocks: with the adapters.
        invocation: the tokens from which on these act; none: everywhere.

    Attributes:
        compute_seconds: that this device has computed so far, without the embedding.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        session: EncodeSession,
        blocks: DecodeBlocks,
        codecs: Codecs,
        *,
        invocation: tuple[int, ...] = (),
        send: Send = "embeddings",
    ) -> None:
        self.invocation = invocation
        self.connection = session.connection
        self.compute_seconds = 0.0
        self._session = session
        self._blocks = blocks
        self._encoder = Encoder(session, Embedding(bundle, engine), codecs, send)
        self._head = Head(bundle, engine)

    @property
    def counters(self) -> WireCounters:
        """What crossed so far."""
        session = self.connection.session
        return session.bytes_sent, session.bytes_received, session.round_trips

    @property
    def context_limit(self) -> int:
        """The most tokens of a context."""
        opening = self.connection.session.opened_with
        assert opening is not None
        return min(opening.context_length, self._blocks.limit)

    def extend(self, ids: LongArray, known: int, acts_from: int, count: int) -> tuple[FloatArray, int]:
        """As ``GeneratingModel`` has it."""
        self._blocks.crop(known)
        kept: list[FloatArray] = []  # last hidden states, of the last tokens; those of a lost session among them
        reused = self._session.run(lambda: self._extend(ids, acts_from, count, kept))
        started = time.perf_counter()
        logits = self._head.logits(np.concatenate(kept)[-count:])
        self.compute_seconds += time.perf_counter() - started
        if not np.isfinite(logits).all():
            text = "the logits are not finite: the adapter is of a run that diverged; train it anew with a lower --lr"
            raise NonFiniteError(text)
        return logits, reused

    def _extend(self, ids: LongArray, acts_from: int, count: int, kept: list[FloatArray]) -> int:
        """Take the rest of the text in; where the session is lost meanwhile, another call goes on.

        Returns how many of its tokens the server held.
        """
        check_room(ids, self.context_limit)
        wanted_from = self._blocks.length
        position = min(wanted_from, self.connection.session.cached_tokens)
        most = self.connection.welcome.max_sequence_length
        end = position
        for part in decode_parts(ids, position, wanted_from=wanted_from, count=count, most=most):
            hidden_states = self._encoder.decode(part, end)
            end += len(part.ids)
            if (wanted := end - self._blocks.length) > 0:
                last = self._append(hidden_states[-wanted:], acts_from)
                kept[:] = [*kept, last[-count:].copy()]
            if len(part.ids) > MANY_TOKENS:  # else the LM head comes on top of what this left
                release_freed_memory()
        return position

    def _append(self, hidden_states: FloatArray, acts_from: int) -> FloatArray:
        """The last hidden states of the next tokens; those before ``acts_from`` are the base model's own."""
        started = time.perf_counter()
        without = min(max(0, acts_from - self._blocks.length), len(hidden_states))
        parts = [
            self._blocks.append(rows, with_lora=acts)
            for rows, acts in ((hidden_states[:without], False), (hidden_states[without:], True))
            if len(rows)
        ]
        self.compute_seconds += time.perf_counter() - started
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def release_weights(self) -> None:
        """Let the pages of the two ends' weights go, which ``extend`` keeps for the next token."""
        self._head.release()
