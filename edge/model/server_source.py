"""Hidden states that a server is asked for as they are needed, and that nothing is kept of."""

from __future__ import annotations

from itertools import chain
from typing import Final

import numpy as np

from dlora.edge.data.batches import MicroBatch
from dlora.edge.memory import MANY_TOKENS, release_freed_memory
from dlora.protocol.tensors import FloatArray
from dlora.protocol.wire_codecs import decode_floats

from .decode_parts import check_room, decode_parts
from .encoding_server import EncodingServer
from .ends import LongArray
from .source import TokenSink


class ServerSource:
    """What comes out of the blocks that a server runs, as ``HiddenStateSource`` has it; and ``TokenSource``, of a
    server that keeps a context. Closes the server's connection with itself.
    """

    kept: Final = None

    def __init__(self, server: EncodingServer) -> None:
        self.crossed = server

    def begin(self) -> None:
        """Connect, so that what a server refuses is refused before anything is asked. Raises as ``encoder`` does."""
        _ = self.crossed.encoder

    def close(self) -> None:
        """Hang up."""
        self.crossed.hang_up()

    def hidden_states(self, batch: MicroBatch) -> FloatArray:
        """Of all texts of a micro-batch, float32 (tokens, width). Raises what ``Encoder.encode`` raises."""
        answers = self.crossed.encode([[ids] for ids in batch.texts()])
        return np.concatenate([decode_floats(tensor) for tensor in chain.from_iterable(answers)])

    @property
    def context_limit(self) -> int:
        """The most tokens of a context."""
        opening = self.crossed.encoder.connection.session.opened_with
        assert opening is not None
        return opening.context_length

    def feed(self, ids: LongArray, count: int, blocks: TokenSink) -> int:
        """As ``TokenSource`` has it. A server that lost its part is given the whole text again; what the blocks have
        had stays. Raises what ``Connection`` raises."""
        return self.crossed.encoder.session.run(lambda: self._feed(ids, count, blocks))

    def _feed(self, ids: LongArray, count: int, blocks: TokenSink) -> int:
        check_room(ids, self.context_limit)  # anew for each session: another server may have less
        encoder, wanted_from = self.crossed.encoder, blocks.length
        position = end = min(wanted_from, encoder.connection.session.cached_tokens)
        most = encoder.connection.welcome.max_sequence_length
        for part in decode_parts(ids, position, wanted_from=wanted_from, count=count, most=most):
            hidden_states = encoder.decode(part, end)
            end += len(part.ids)
            if (wanted := end - blocks.length) > 0:
                blocks.append(hidden_states[-wanted:])
            if len(part.ids) > MANY_TOKENS:  # else the LM head comes on top of what this left
                release_freed_memory()
        return position
