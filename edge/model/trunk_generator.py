"""A model to generate with in the mode ``trunk``: the server runs the first blocks, this device the last ones.

Both hold keys and values of their blocks. One round trip gives what comes out of the server's blocks for new tokens,
and the rest is done here, adapters and logits with it. A server that lost its part is given the whole text again; what
this device holds stays.
"""

from __future__ import annotations

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.memory import MANY_TOKENS, release_freed_memory
from dlora.protocol.choices import Send
from dlora.protocol.wire_codecs import Codecs

from .decode_blocks import DecodeBlocks
from .decode_parts import check_room, decode_parts
from .device_generator import DeviceGenerator
from .encoder import Encoder, EncodeSession
from .ends import Embedding, LongArray
from .trainable import WireCounters


class TrunkGenerator(DeviceGenerator):
    """As ``GeneratingModel`` has it.

    Args:
        session: one that is open, of the blocks before the first of ``blocks``, with a context.
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
        super().__init__(bundle, engine, blocks, invocation)
        self.connection = session.connection
        self._session = session
        self._encoder = Encoder(session, Embedding(bundle, engine), codecs, send)

    @property
    def counters(self) -> WireCounters:
        """What crossed so far."""
        return self.connection.session.counters

    @property
    def context_limit(self) -> int:
        """The most tokens of a context."""
        opening = self.connection.session.opened_with
        assert opening is not None
        return min(opening.context_length, self._blocks.limit)

    def _take_in(self, ids: LongArray, acts_from: int, count: int) -> int:
        return self._session.run(lambda: self._ask(ids, acts_from, count))

    def _ask(self, ids: LongArray, acts_from: int, count: int) -> int:
        """Where the session is lost meanwhile, another call goes on from what the blocks have."""
        check_room(ids, self.context_limit)
        wanted_from = self._blocks.length
        position = end = min(wanted_from, self.connection.session.cached_tokens)
        most = self.connection.welcome.max_sequence_length
        for part in decode_parts(ids, position, wanted_from=wanted_from, count=count, most=most):
            hidden_states = self._encoder.decode(part, end)
            end += len(part.ids)
            if (wanted := end - self._blocks.length) > 0:
                self._append(hidden_states[-wanted:], acts_from, count)
            if len(part.ids) > MANY_TOKENS:  # else the LM head comes on top of what this left
                release_freed_memory()
        return position
