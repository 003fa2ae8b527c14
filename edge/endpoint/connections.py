"""Connections of strangers: how many there may be, and how long each may take to ask.

uvicorn drops a connection that says nothing between two requests, and waits for ever for a request that never ends: a
thousand half headers took all the files that a process may have open, before anybody had shown a key.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections import Counter
from typing import Any, Final, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from dlora.protocol.connections import raise_file_limit, source_of

from .event_stream import UNREAD_S

MAX_CONNECTIONS: Final = 512
MAX_OF_ONE_SOURCE: Final = 256
ACCEPTED_AT_ONCE: Final = 64
REQUEST_S: Final = 10.0
# A connection is counted, and another closed in its place, some turns of the event loop after it was accepted.
_OTHER_FILES: Final = 64 + 4 * ACCEPTED_AT_ONCE


class Connections:
    """All connections of a server, within limits. For one event loop.

    Where there are too many, one makes room: of the source that has most, so that a flood from one address costs no
    other anything, and of these the one that has waited longest for its peer. An honest request takes milliseconds to
    come, so it outlives a flood.

    Args:
        most: connections at a time; most_of_one_source: those of one address.
    """

    def __init__(self, most: int = MAX_CONNECTIONS, most_of_one_source: int = MAX_OF_ONE_SOURCE) -> None:
        files = raise_file_limit()
        if files != resource.RLIM_INFINITY:
            most = min(most, max(8, files - _OTHER_FILES))
        self._most = most
        self._most_of_one_source = min(most_of_one_source, self._most)
        self._open: dict[EndpointProtocol, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def protocol(self, **settings: Any) -> EndpointProtocol:
        """What uvicorn makes for each connection, in place of a protocol of its own."""
        return EndpointProtocol(self, **settings)

    def admit(self, connection: EndpointProtocol) -> None:
        """Count one more; it, or another, is aborted where these are too many."""
        self._open[connection] = None
        counts = Counter(each.source for each in self._open)
        if counts[connection.source] > self._most_of_one_source:
            self._make_room(connection.source, connection)
        elif len(self._open) > self._most:
            self._make_room(max(counts, key=counts.__getitem__), connection)

    def forget(self, connection: EndpointProtocol) -> None:
        """It has ended."""
        self._open.pop(connection, None)

    def _make_room(self, source: str, newest: EndpointProtocol) -> None:
        waiting = [each for each in self._open if each.source == source and each.is_waiting]
        # Where all others are answered, whoever comes now is one too many.
        gives_way = min(waiting, key=lambda each: each.waiting_since, default=newest)
        gives_way.abort()


class EndpointProtocol(H11Protocol):
    """A connection, by uvicorn, whose peer has ``REQUEST_S`` to say all that stands before a request's body, and as
    long again once it was answered. Bytes that come now and then are no progress. Bodies: ``Bodies``.

    Attributes:
        source: the peer's address; of IPv6 the /64, which is what one customer has.
        waiting_since: since when its peer has to say something, in seconds of ``time.monotonic``.
    """

    def __init__(self, connections: Connections, **settings: Any) -> None:
        super().__init__(**settings)
        self.source = "?"
        self.waiting_since = 0.0
        self._connections = connections
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for its peer: for a request, or for the rest of one."""
        return self._is_between_requests or self.cycle.more_body

    def abort(self) -> None:
        """Drop it without a word."""
        self._connections.forget(self)
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.source = source_of(self.client[0]) if self.client else "?"
        self._follow()
        self._connections.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.forget(self)
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()

    @property
    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _follow(self) -> None:
        """Start the timer where it is the peer's turn, and stop it once a request is under way."""
        if self.transport.is_closing() or self._is_between_requests == (self._timer is not None):
            return
        self.waiting_since = time.monotonic()
        if self._timer is None:
            self._timer = self.loop.call_later(REQUEST_S, self._give_up)
        else:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if not self.transport.get_write_buffer_size():
            self.abort()
        else:  # it still reads the last answer
            self.transport.close()
            self._timer = self.loop.call_later(UNREAD_S, self.abort)
