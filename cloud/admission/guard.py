"""Strangers with a socket: what a connection may cost before, and beneath, the messages of the conversation.

A ``Guard`` is shared by all connections of a server. It keeps few of those that have not opened a session, and
makes room by aborting the oldest: an honest handshake takes milliseconds, so it outlives a flood, as in a
kernel's SYN queue. A ``GuardedConnection`` looks at each websocket frame before it becomes a message.

The rest is settings of websockets, all in ``Guard.settings``, and tests/attacks/ shows what each stops.
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from websockets.asyncio.server import ServerConnection
from websockets.frames import Frame, Opcode
from websockets.protocol import Event, State

from dlora.protocol.connections import source_of
from dlora.protocol.messages import ErrorCode
from dlora.protocol.passes import MOST_PIECES
from dlora.protocol.text import one_line

from .quotas import SessionQuota
from .reasons import Reason

logger = logging.getLogger("dlora.cloud")

PING_EVERY_S = 20.0
# A device computes between messages and may sleep; the pong comes from its reading thread, not its compute.
PING_TIMEOUT_S = 60.0
LOG_EVERY_S = 10.0
LOGGED_CHARACTERS = 300  # of what a peer had a hand in
SMALLEST_UNREAD_BYTES = 1 << 20
PIECE_BYTES = 4 << 10  # parsed before its frames are looked at: at most 700 pings


@dataclass(frozen=True)
class ConnectionLimits:
    """What connections may cost. The defaults are far from what a device needs, and as far from what hurts.

    Attributes:
        sessions: connections with an open session; there are never more than these and ``unfinished`` together.
        unfinished: connections that have not opened a session.
        unfinished_bytes: bytes that those may have sent, together.
        first_frame_bytes: largest frame until ``limit_frames`` says otherwise.
        control_frames: pings and pongs in ``control_window_s``; keepalive needs one in 20 s.
        waiting_frames: messages that nobody has taken yet; the conversation has a few in flight, in passes up to 32
            small ones of each micro-batch.
        unread_frames: answers that a device has not read yet, in largest frames.
        handshake_s: time for TLS, and again for the websocket's handshake.
        close_s: time for a peer that is told to go.
    """

    sessions: int
    unfinished: int = 256
    unfinished_bytes: int = 64 << 20
    first_frame_bytes: int = 64 << 10
    control_frames: int = 60
    control_window_s: float = 10.0
    waiting_frames: int = 256
    unread_frames: int = 4
    handshake_s: float = 10.0
    close_s: float = 5.0


class Guard:
    """Counts the connections of a server and keeps them within limits. For one event loop.

    Args:
        tls: speak TLS. Give it here, not to ``serve``: so a connection counts before its TLS handshake costs anything.
        clock: seconds, for tests.

    Attributes:
        refused: how often so far, by ``Reason`` or code.
    """

    def __init__(
        self,
        limits: ConnectionLimits,
        *,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.tls = tls
        self.clock = clock
        self._unfinished: dict[GuardedConnection, None] = {}  # in the order of their arrival
        self._opened: set[GuardedConnection] = set()
        self._unfinished_bytes = 0
        self._closed = False
        self.refused: Counter[str] = Counter()
        self._logged: dict[str, tuple[float, int]] = {}  # when last, and how many there had been

    @property
    def unfinished(self) -> int:
        """Connections that have not opened a session."""
        return len(self._unfinished)

    @property
    def opened(self) -> int:
        """Connections that have."""
        return len(self._opened)

    def settings(self) -> dict[str, Any]:
        """The arguments of ``websockets.asyncio.server.serve`` that the guard is responsible for."""
        limits = self.limits
        return {
            "create_connection": partial(GuardedConnection, self),
            "origins": [None],  # no Origin header at all: devices are no browsers
            "compression": None,  # hidden states do not compress, and a compression bomb could exhaust memory
            "max_size": limits.first_frame_bytes,
            "max_queue": 1 + MOST_PIECES,  # what a micro-batch in passes may begin with
            "open_timeout": limits.handshake_s,
            "close_timeout": limits.close_s,
            "server_header": None,
        }

    def ping_silent(self) -> None:
        """Ping those with a session that have said nothing for ``PING_EVERY_S``, and drop those that do not answer.

        Devices ping us as often, so that of a thousand that are there none needs a ping of ours, nor a task for it.
        """
        now = self.clock()
        for connection in list(self._opened):
            if now - connection.heard_at < PING_EVERY_S:
                continue
            if connection.pinged_at <= connection.heard_at:
                connection.ping_once()
            elif now - connection.pinged_at >= PING_TIMEOUT_S:
                connection.abort()

    def abort_unfinished(self) -> None:
        """Abort all without a session, and all that come: a slow peer must not delay a server that stops."""
        self._closed = True
        for connection in list(self._unfinished):
            connection.abort()

    def log_refusal(self, reason: str, peer: str, detail: str = "") -> None:
        """Log why a peer was refused, each reason at most once in ``LOG_EVERY_S``, with how many there were.

        ``reason``: a ``Reason`` or an ``ErrorCode``; ``peer`` and ``detail`` are of the last of them.

        A line each would let a flood of connections fill the disk.
        """
        if count := self._count(reason):
            more = f": {one_line(detail, LOGGED_CHARACTERS)}" if detail else ""
            logger.warning("refused %d × %s; the last from %s%s", count, reason, peer, more)

    def log_bug(self, error: Exception, peer: str) -> None:
        """Log a bug of ours with its traceback, as seldom as refusals: a stranger may know how to trigger it."""
        if count := self._count(ErrorCode.INTERNAL):
            logger.error("internal error × %d, before a session; the last with %s", count, peer, exc_info=error)

    # -- for GuardedConnection ---------------------------------------------------------------------------

    def admit(self, connection: GuardedConnection) -> None:
        self._unfinished[connection] = None
        if self._closed:
            connection.abort()
            return
        limits = self.limits
        room = min(limits.unfinished, limits.sessions + limits.unfinished - len(self._opened))
        if len(self._unfinished) > room:
            # Of the source that has most: a flood from one address costs others nothing, however slow their lines.
            sources = Counter(waiting.source for waiting in self._unfinished)
            greediest = max(sources, key=sources.__getitem__)
            oldest = next(waiting for waiting in self._unfinished if waiting.source == greediest)
            oldest.abort_for(Reason.MANY_CONNECTIONS)

    def count_received(self, connection: GuardedConnection, nbytes: int) -> None:
        if connection in self._unfinished:
            connection.received_bytes += nbytes
            self._unfinished_bytes += nbytes
            if self._unfinished_bytes > self.limits.unfinished_bytes:
                greediest = max(self._unfinished, key=lambda waiting: waiting.received_bytes)
                greediest.abort_for(Reason.MANY_BYTES)

    def move_to_opened(self, connection: GuardedConnection) -> None:
        if connection in self._unfinished:
            self.forget(connection)
            self._opened.add(connection)

    def forget(self, connection: GuardedConnection) -> None:
        if connection in self._unfinished:
            del self._unfinished[connection]
            self._unfinished_bytes -= connection.received_bytes
        self._opened.discard(connection)

    def _count(self, reason: str) -> int:
        """Count one more: how many are to be logged now, or 0 for not now."""
        self.refused[reason] += 1
        now, (logged_at, logged) = self.clock(), self._logged.get(reason, (-LOG_EVERY_S, 0))
        if now - logged_at < LOG_EVERY_S:
            return 0
        self._logged[reason] = now, self.refused[reason]
        return self.refused[reason] - logged


class GuardedConnection(ServerConnection):
    """A websocket whose peer is not trusted with more than its ``Guard`` allows.

    What the peer breaks closes the connection with 1008 and an ``ErrorCode`` as the reason; with websocket's own codes
    where what came along with it, within ``PIECE_BYTES``, breaks websocket's own rules.

    Attributes:
        guard: of all connections of the server.
        address: the peer's.
        source: whom it counts for: the peer's address or, once its headers are read, the one that a proxy in front of
            us has seen; of IPv6 the /64, which is what one customer has.
        received_bytes: before a session was opened.
        heard_at: when something came last, on the guard's clock; pinged_at: when it was pinged last.
    """

    def __init__(self, guard: Guard, protocol: Any, server: Any, **settings: Any) -> None:
        super().__init__(protocol, server, **settings)
        self.guard = guard
        self.address = self.source = "?"
        self.received_bytes = 0
        self.heard_at = guard.clock()
        self.pinged_at = -math.inf
        self._tcp: asyncio.Transport | None = None
        self._made = False
        self._early_bytes = bytearray()
        self._tls_handshake: asyncio.Task[None] | None = None
        self._close_timer: asyncio.TimerHandle | None = None
        self._frame_limit = guard.limits.first_frame_bytes
        self._window_began = guard.clock()
        self._controls = 0
        self._waiting: deque[int] = deque()  # of each message that nobody has taken yet, the bytes that count
        self._unread: SessionQuota | None = None
        self._refused = False

    # -- for the server ----------------------------------------------------------------------------------

    def session_opened(self, unread: SessionQuota) -> None:
        """A session was opened or resumed: this connection does not count as a stranger's any more.

        ``unread`` counts the messages that come from now on, until they are taken.
        """
        self._unread = unread
        self.guard.move_to_opened(self)

    def limit_frames(self, nbytes: int) -> None:
        """Take frames of so many bytes from now on. Call it before the message that lets the peer send them."""
        self._frame_limit = nbytes
        self.protocol.max_message_size = nbytes  # what ``serve`` got as ``max_size``

    def ping_once(self) -> None:
        """Send a ping; any answer will do."""
        self.pinged_at = self.guard.clock()
        if self.protocol.state is State.OPEN:
            self.protocol.send_ping(b"")
            self.send_data()

    def abort(self) -> None:
        """Drop the connection without a word, whatever it is doing."""
        self.guard.forget(self)
        if self._tcp is not None:
            self._tcp.abort()

    def abort_for(self, reason: Reason) -> None:
        """Likewise, and log why."""
        self.guard.log_refusal(reason, self.source)
        self.abort()

    async def recv(self, decode: bool | None = None) -> Any:
        """As ``ServerConnection.recv``."""
        message = await super().recv(decode)
        self._count_taken(self._waiting.popleft())
        return message

    async def send(self, message: Any, **how: Any) -> None:
        """As ``ServerConnection.send``; a peer that reads nothing is dropped before it costs more memory."""
        self._check_unread()
        await super().send(message, **how)

    # -- asyncio.Protocol --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._tcp = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        if peer:
            self.address = str(peer[0])
            self.source = source_of(self.address)
        self.guard.admit(self)
        if self.guard.tls is None:
            self._begin(transport)
        else:
            self._tls_handshake = self.loop.create_task(self._start_tls(self._tcp, self.guard.tls))

    def data_received(self, data: bytes) -> None:
        if not self._made:
            self._early_bytes += data
            return
        self.heard_at = self.guard.clock()
        self.guard.count_received(self, len(data))
        # A read may hold 40,000 pings, and websockets tells of frames only when all that it got was parsed.
        for start in range(0, len(data), PIECE_BYTES):
            if self._refused or self.protocol.state is State.CLOSED:  # TLS tells within a piece that the peer has left
                break
            super().data_received(data[start : start + PIECE_BYTES])
        self._check_unread()
        if self.protocol.close_expected() and self._close_timer is None:
            # websockets waits for its peer to close as well, and finds out with the next keepalive ping.
            self._close_timer = self.loop.call_later(self.guard.limits.close_s, self.abort)

    def process_event(self, event: Event) -> None:
        """As ``ServerConnection.process_event``; what is refused closes the connection, and no later frame counts."""
        if self._refused:
            return
        if isinstance(event, Frame) and not self._check_frame(event):
            self._refused = True
            self.send_data()
        else:
            super().process_event(event)

    def eof_received(self) -> None:
        if self._made:
            super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.forget(self)
        if self._close_timer is not None:
            self._close_timer.cancel()
        if self._made:
            super().connection_lost(exc)
        # What has come stays to be read, but for as long as nobody does it is held for nobody.
        for nbytes in self._waiting:
            self._count_taken(nbytes)
        self._waiting = deque(0 for _ in self._waiting)

    # ----------------------------------------------------------------------------------------------------

    def _begin(self, transport: asyncio.BaseTransport) -> None:
        self._made = True
        super().connection_made(transport)

    async def _start_tls(self, tcp: asyncio.Transport, context: ssl.SSLContext) -> None:
        try:
            secure = await self.loop.start_tls(
                tcp, self, context, server_side=True, ssl_handshake_timeout=self.guard.limits.handshake_s
            )
        except OSError as error:  # of which TLS's, timeouts and lost connections are
            logger.debug("TLS handshake: %s", error)
            self.abort_for(Reason.NO_TLS)
            return
        if secure is None or secure.is_closing():
            self.abort()
            return
        self._begin(secure)
        if self._early_bytes:  # the client may send its request along with the end of its handshake
            self.data_received(bytes(self._early_bytes))
            self._early_bytes.clear()

    def _check_frame(self, frame: Frame) -> bool:
        match frame.opcode:
            case Opcode.PING | Opcode.PONG:
                now = self.guard.clock()
                if now - self._window_began >= self.guard.limits.control_window_s:
                    self._window_began, self._controls = now, 0
                self._controls += 1
                if self._controls > self.guard.limits.control_frames:
                    return self._refuse(ErrorCode.FLOOD, Reason.PINGS)
            case Opcode.TEXT:
                return self._refuse(ErrorCode.PROTOCOL, Reason.TEXT)
            case Opcode.BINARY | Opcode.CONT:
                if not frame.fin or frame.opcode is Opcode.CONT:
                    return self._refuse(ErrorCode.PROTOCOL, Reason.FRAGMENTS)
                counted = len(frame.data) if self._unread is not None else 0
                if self._unread is not None and not self._unread.add(counted):
                    return self._refuse(ErrorCode.FLOOD, Reason.NO_MEMORY)
                self._waiting.append(counted)
                if len(self._waiting) > self.guard.limits.waiting_frames:
                    return self._refuse(ErrorCode.FLOOD, Reason.MESSAGES)
            case _:
                pass
        return True

    def _count_taken(self, nbytes: int) -> None:
        if self._unread is not None and nbytes:
            self._unread.remove(nbytes)

    def _refuse(self, code: ErrorCode, reason: Reason) -> bool:
        self.guard.log_refusal(reason, self.source)
        self.protocol.fail(1008, code)
        return False

    def _check_unread(self) -> None:
        most = max(self.guard.limits.unread_frames * self._frame_limit, SMALLEST_UNREAD_BYTES)
        if not self.transport.is_closing() and self.transport.get_write_buffer_size() > most:
            self.abort_for(Reason.UNREAD)
