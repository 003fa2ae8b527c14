"""A server that runs the first blocks: connected to when it is asked, and all that crossed is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Final

import numpy as np

from dlora.edge.adapters.compatibility import check_base_model
from dlora.edge.data.batches import MicroBatch
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.memory import MANY_TOKENS, release_freed_memory
from dlora.edge.wire.connection import Connection
from dlora.edge.wire.usage import Crossed, CrossedSoFar, WireCounters, WireUsage
from dlora.protocol import messages as m
from dlora.protocol.choices import Send, TableDtype
from dlora.protocol.errors import UsageError
from dlora.protocol.tensors import FloatArray, WireTensor
from dlora.protocol.wire_codecs import Codecs, decode_floats

from .block_weights import encoded_width
from .decode_parts import check_room, decode_parts
from .encoder import Encoder
from .ends import LongArray
from .extension import Fed

if TYPE_CHECKING:
    from .device_generator import DeviceGenerator


class EncodingServer:
    """What comes out of a server's blocks, and is not kept; and as ``Crossed`` has it, over all connections so far.

    Args:
        blocks: how many of the first blocks it runs.
        connect: connects to it.
        context_length: for how many tokens it is to keep keys and values of its blocks; 0: none.
        drafts: of the embedding table, where it is to guess tokens that may come next.
    """

    kept: Final = None

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        connect: Callable[[], Connection],
        *,
        blocks: int,
        codecs: Codecs,
        send: Send = "embeddings",
        context_length: int = 0,
        drafts: TableDtype | None = None,
    ) -> None:
        self._drafts = drafts
        self._bundle = bundle
        self._engine = engine
        self._connect = connect
        self._blocks = blocks
        self._codecs = codecs
        self._send = send
        self._context_length = context_length
        self._asked: list[Crossed] = []  # the connections so far; of those that are closed, what they came to
        self._connection: Connection | None = None
        self._encoder: Encoder | None = None

    @property
    def crossed(self) -> Crossed:
        """What crossed so far."""
        return self  # not an attribute: that would keep it, and its engine, until garbage is collected

    @property
    def counters(self) -> WireCounters:
        """What crossed so far."""
        up, down, trips = map(sum, zip((0, 0, 0), *(each.counters for each in self._asked), strict=True))
        return up, down, trips

    @property
    def usage(self) -> WireUsage:
        """Likewise, by role, and the time that it took."""
        return sum((each.usage for each in self._asked), WireUsage())

    @property
    def welcome(self) -> m.Welcome | None:
        """What the server said of itself, once it was asked."""
        return self._asked[-1].welcome if self._asked else None

    @property
    def reconnects(self) -> int:
        """As ``Connection`` has it."""
        return sum(each.reconnects for each in self._asked)

    @property
    def resumed(self) -> int:
        """Likewise."""
        return sum(each.resumed for each in self._asked)

    @property
    def encoder(self) -> Encoder:
        """Who is asked; connected to where nobody is yet.

        Raises what ``Connection`` raises, ``ModelMismatchError``, and ``UsageError`` for a server that keeps no context
        where one is needed.
        """
        if self._encoder is None:
            self._connection = connection = self._connect()
            self._asked.append(connection)
            check_base_model(self._bundle, connection.welcome)
            if self._context_length and not connection.welcome.max_context_length:
                raise UsageError(
                    "the server keeps no context of this model, which blocks on this device need; use --device-blocks 0"
                )
            width = encoded_width(self._bundle.manifest)
            purpose = m.Encode(
                blocks=self._blocks, width=width, context_length=self._context_length, drafts=self._drafts
            )
            self._encoder = Encoder(self._bundle, self._engine, connection, purpose, self._codecs, self._send)
        return self._encoder

    def begin(self) -> None:
        """Connect, so that what a server refuses is refused before anything is asked. Raises as ``encoder`` does."""
        _ = self.encoder

    def encode(self, packs: Sequence[Sequence[LongArray]]) -> Iterator[list[WireTensor]]:
        """As ``Encoder.encode``."""
        return self.encoder.encode(packs)

    def hidden_states(self, batch: MicroBatch) -> FloatArray:
        """Of all texts of a micro-batch, float32 (tokens, width). Raises what ``Encoder.encode`` raises."""
        answers = self.encode([[ids] for ids in batch.texts()])
        return np.concatenate([decode_floats(tensor) for tensor in chain.from_iterable(answers)])

    @property
    def can_guess(self) -> bool:
        """Whether it guesses tokens that may come next."""
        return self._drafts is not None

    @property
    def context_limit(self) -> int:
        """The most tokens of a context."""
        opening = self.encoder.connection.session.opened_with
        assert opening is not None
        return opening.context_length

    def feed(self, ids: LongArray, count: int, blocks: DeviceGenerator, drafts: int) -> Fed:
        """Give ``blocks`` what they have not had of a text, int64 (tokens,), of which ``count`` are wanted for certain,
        and of at most ``drafts`` tokens that the server guesses to follow.

        A server that lost its part is given the whole text again; what the blocks have had stays. Raises what
        ``Connection`` raises, and ``DataError`` for a text that is too long.
        """
        return self.encoder.session.run(lambda: self._feed(ids, count, blocks, drafts))

    def _feed(self, ids: LongArray, count: int, blocks: DeviceGenerator, drafts: int) -> Fed:
        check_room(ids, self.context_limit)  # anew for each session: another server may have less
        encoder, wanted_from = self.encoder, blocks.length
        position = end = min(wanted_from, encoder.connection.session.cached_tokens)
        most = encoder.connection.welcome.max_sequence_length
        guessed: tuple[int, ...] = ()
        drafts_s = 0.0
        for part in decode_parts(ids, position, wanted_from=wanted_from, count=count, most=most):
            is_last = end + len(part.ids) == len(ids)
            hidden_states, guessed, drafts_s = encoder.decode(part, end, drafts if is_last else 0)
            end += len(part.ids) + len(guessed)
            if (wanted := end - blocks.length) > 0:
                blocks.append(hidden_states[-wanted:])
            if len(part.ids) > MANY_TOKENS:  # else the LM head comes on top of what this left
                release_freed_memory()
        return Fed(position, guessed, drafts_s)

    def close(self) -> None:
        """Hang up; who asks again opens another connection."""
        if self._connection is None:
            return
        connection = self._connection
        self._connection = self._encoder = None
        self._asked[-1] = CrossedSoFar.of(connection)  # what the close itself takes is not counted
        connection.close()
