"""A server that runs the first blocks: connected to when it is asked, and all that crossed is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dlora.edge.adapters.compatibility import check_base_model
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.wire.connection import Connection
from dlora.edge.wire.usage import WireCounters, WireUsage
from dlora.protocol.choices import Send
from dlora.protocol.errors import UsageError
from dlora.protocol.messages import Welcome
from dlora.protocol.tensors import WireTensor
from dlora.protocol.wire_codecs import Codecs

from .block_weights import encoded_width
from .encoder import Encoder, EncodeSession
from .ends import Embedding, LongArray


class EncodingServer:
    """As ``Crossed`` has it, over all connections so far.

    Args:
        blocks: how many of the first blocks it runs.
        connect: connects to it.
        context_length: for how many tokens it is to keep keys and values of its blocks; 0: none.
    """

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
    ) -> None:
        self.welcome: Welcome | None = None
        self._bundle = bundle
        self._engine = engine
        self._connect = connect
        self._blocks = blocks
        self._codecs = codecs
        self._send = send
        self._context_length = context_length
        self._connection: Connection | None = None
        self._encoder: Encoder | None = None
        # Of connections that are closed.
        self._counted: WireCounters = (0, 0, 0)
        self._used = WireUsage()
        self._reconnects = self._resumed = 0

    @property
    def counters(self) -> WireCounters:
        """What crossed so far."""
        if self._connection is None:
            return self._counted
        both = zip(self._counted, self._connection.counters, strict=True)
        up, down, trips = (before + since for before, since in both)
        return up, down, trips

    @property
    def usage(self) -> WireUsage:
        """Likewise, by role, and the time that it took."""
        return self._used if self._connection is None else self._used + self._connection.usage

    @property
    def reconnects(self) -> int:
        """As ``Connection`` has it."""
        return self._reconnects + (0 if self._connection is None else self._connection.reconnects)

    @property
    def resumed(self) -> int:
        """Likewise."""
        return self._resumed + (0 if self._connection is None else self._connection.resumed)

    @property
    def encoder(self) -> Encoder:
        """Who is asked; connected to where nobody is yet.

        Raises what ``Connection`` raises, ``ModelMismatchError``, and ``UsageError`` for a server that keeps no context
        where one is needed.
        """
        if self._encoder is None:
            self._connection = connection = self._connect()
            self.welcome = connection.welcome
            check_base_model(self._bundle, connection.welcome)
            if self._context_length and not connection.welcome.max_context_length:
                raise UsageError(
                    "the server keeps no context of this model, which blocks on this device need; use --device-blocks 0"
                )
            session = EncodeSession(
                connection,
                self._codecs,
                blocks=self._blocks,
                width=encoded_width(self._bundle.manifest),
                base_fingerprint=self._bundle.manifest.base_model.fingerprint,
                context_length=self._context_length,
            )
            session.open()
            self._encoder = Encoder(session, Embedding(self._bundle, self._engine), self._codecs, self._send)
        return self._encoder

    def encode(self, packs: Sequence[Sequence[LongArray]]) -> Iterator[list[WireTensor]]:
        """As ``Encoder.encode``."""
        return self.encoder.encode(packs)

    def hang_up(self) -> None:
        """Close the connection; who asks again opens another."""
        if self._connection is None:
            return
        connection, counted, used = self._connection, self.counters, self.usage
        self._connection = self._encoder = None
        self._counted, self._used = counted, used
        self._reconnects += connection.reconnects
        self._resumed += connection.resumed
        connection.close()

    close = hang_up
