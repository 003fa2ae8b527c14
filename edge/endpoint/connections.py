"""Connections of strangers: how many there may be, how long each may take, and what of HTTP each may say.

uvicorn drops a connection that says nothing between two requests, and waits for ever for a request that never ends and
for a peer that never reads: a thousand half headers took all the files that a process may have open, before anybody had
shown a key.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dlora.protocol.connections import raise_file_limit, source_of

from .event_stream import UNREAD_S

MAX_CONNECTIONS: Final = 512
MAX_OF_ONE_SOURCE: Final = 256
MAX_HEAD_BYTES: Final = 16 << 10  # of a request before its body; and of what is sent behind a request that is answered
ACCEPTED_AT_ONCE: Final = 64
REQUEST_S: Final = 10.0
_LOOK_EVERY_S: Final = 1.0
_READ_BYTES: Final = 64 << 10  # at once: the event loop does nothing else while they are parsed
_MAX_PARTS: Final = 1024  # of these: chunks of a few bytes take a hundred times as long as the same bytes in one
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
        self._looking: asyncio.TimerHandle | None = None
        self._stopping = False

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._open)

    def protocol(self, **settings: Any) -> EndpointProtocol:
        """What uvicorn makes for each connection, in place of a protocol of its own."""
        return EndpointProtocol(self, **settings)

    def admit(self, connection: EndpointProtocol) -> None:
        """Count one more; it, or another, is aborted where these are too many."""
        self._open[connection] = None
        if self._looking is None:
            self._look()
        counts = Counter(each.source for each in self._open)
        if self._stopping:
            connection.abort()
        elif counts[connection.source] > self._most_of_one_source:
            self._make_room(connection.source, connection)
        elif len(self._open) > self._most:
            self._make_room(max(counts, key=counts.__getitem__), connection)

    def forget(self, connection: EndpointProtocol) -> None:
        """It has ended."""
        self._open.pop(connection, None)

    def stop(self) -> None:
        """Abort those that were asked nothing, and all that come: none of them may delay a server that stops."""
        self._stopping = True
        for each in list(self._open):
            if not each.is_asked:
                each.abort()

    def _make_room(self, source: str, newest: EndpointProtocol) -> None:
        waiting = [each for each in self._open if each.source == source and each.is_waiting]
        # Where all others are answered, whoever comes now is one too many.
        gives_way = min(waiting, key=lambda each: each.look(), default=newest)
        gives_way.abort()

    def _look(self) -> None:
        now = time.monotonic()
        for each in list(self._open):
            if now - each.look() > each.most_s:
                each.abort()
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(_LOOK_EVERY_S, self._look) if self._open else None


class EndpointProtocol(H11Protocol):
    """A connection, by uvicorn, whose peer has ``REQUEST_S`` to say all that stands before a request's body, and as
    long again once it was answered; bytes that come now and then are no progress. It has ``UNREAD_S`` to read more of
    what was sent. How long a body may take is for ``Bodies``.

    Attributes:
        source: the peer's address; of IPv6 the /64, which is what one customer has.
    """

    def __init__(self, connections: Connections, **settings: Any) -> None:
        super().__init__(**settings)
        self.source = "?"
        self._connections = connections
        self._state: tuple[object, ...] = ()
        self._since = time.monotonic()
        self._parts = 0
        self.conn.next_event = self._counted(self.conn.next_event)  # type: ignore[method-assign]

    @property
    def is_asked(self) -> bool:
        """Whether a whole request has come, and its answer, or a part of that, has not yet left."""
        return bool(self._unread) or not (self._is_between_requests or self.cycle.more_body)

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for its peer: to say something, or to read."""
        return bool(self._unread) or not self.is_asked

    @property
    def most_s(self) -> float:
        """How long it may stay as it is."""
        if self._unread:
            return UNREAD_S
        return REQUEST_S if self._is_between_requests else float("inf")

    def look(self) -> float:
        """Since when it is as it is: nothing was begun or answered, and its peer has read nothing."""
        state = (self.cycle, self._is_between_requests, self._unread)
        if state != self._state:
            self._state, self._since = state, time.monotonic()
        return self._since

    def abort(self) -> None:
        """Drop it without a word."""
        self._connections.forget(self)
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.source = source_of(self.client[0]) if self.client else "?"
        self.transport.max_size = _READ_BYTES  # type: ignore[attr-defined]  # of asyncio's own
        self._connections.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._parts = 0
        super().data_received(data)
        behind = len(self.conn.trailing_data[0]) if self.conn.their_state is h11.DONE else 0
        if behind > MAX_HEAD_BYTES:
            self.abort()
        elif behind:  # uvicorn reads no more until the answer is done, and would not see that its peer leaves
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Say so where nothing was answered yet. Nothing else is sent then, which h11 would raise for."""
        if not self._is_between_requests:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            self.abort()

    @property
    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @property
    def _unread(self) -> int:
        return self.transport.get_write_buffer_size()

    def _counted(self, next_event: Callable[[], Any]) -> Callable[[], Any]:
        def counted() -> Any:
            self._parts += 1
            if self._parts > _MAX_PARTS:
                self.abort()
                return h11.NEED_DATA
            return next_event()

        return counted
