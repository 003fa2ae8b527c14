"""One session's frames, over connections that come and go.

A session reads and writes as if there were one connection. When that is lost it is *parked*: it waits, in the middle of
a micro-batch if it must, until the device comes back over another connection. What was under way between them is made
up for by ``protocol/link.py``. In the middle of something a thread waits; between two such times, nothing but the event
loop does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import TypeVar

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from dlora.protocol import messages as m
from dlora.protocol.errors import NonFiniteError, RefusedError, RemoteProtocolError
from dlora.protocol.session import Session
from dlora.protocol.states import Side

from .tasks import Tasks

T = TypeVar("T")

logger = logging.getLogger("dlora.cloud")

CLOSE_TIMEOUT_S = 1.0


class DeviceGoneError(Exception):
    """The session has lost its device for good; its text says how."""


class SessionTransport:
    """The connection that a session has at the moment, or none.

    Reading only when asked leaves backpressure to the websocket. Sending never waits: a session sends while it holds
    the compute gate, and a device that does not read must stall nobody but itself. What was sent is waited for before
    the next message is read, so that no more than one answer's frames pile up.

    Args:
        name: of the session; device: of its device; both for the log.
        frames_ahead: how many frames may still wait to leave when the next message is read. Where several micro-batches
            are under way, the device may be sending for one while another's frames leave: it reads those only once we
            have read what it sends.
        park_s: how long a session without a connection is kept.
        closing_tasks: to devices that are told to go, until they have heard it.
        clock: seconds that never go back.

    Attributes:
        times_lost: how often the connection was lost.
        parked_at: since when there is none that is open, on ``clock``; None while there is one.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: ServerConnection,
        *,
        name: str,
        device: str,
        frames_ahead: int = 0,
        park_s: float,
        closing_tasks: Tasks,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.times_lost = 0
        self.parked_at: float | None = None
        self._loop = loop
        self._name = name
        self._device = device
        self._frames_ahead = frames_ahead
        self._park_s = park_s
        self._closing_tasks = closing_tasks
        self._clock = clock
        self._changed = threading.Condition()
        self._connection: ServerConnection | None = connection
        self._sending: deque[tuple[ServerConnection, Future[None]]] = deque()
        self._leaving, self._arriving = asyncio.Lock(), asyncio.Lock()  # of the present connection: one after the other
        self._arrived: deque[bytes] = deque()  # likewise, what nobody has taken yet
        self._ended: Exception | None = None
        self._receiving: Future[deque[bytes]] | None = None
        self._idle: asyncio.Task[None] | None = None  # waits for a frame on the event loop
        self._back: asyncio.Future[None] | None = None  # done when the device is back that it waits for
        self._sent_away_s = 0.0  # how much longer than park_s it may stay away, as it was told to

    # -- the session's thread ----------------------------------------------------------------------------

    def send(self, frame: bytearray) -> None:
        """Send over the present connection; without one, the link keeps the frame for the next."""
        with self._changed:
            if self._connection is not None:
                self._begin_to_send(self._connection, frame)

    def _begin_to_send(self, connection: ServerConnection, frame: bytearray) -> None:
        leaving = self._leaving

        async def send() -> None:
            # Each leaves when the one before is on its way: a wave's frames would all be written at once, and whoever
            # reads slowly be taken for one who does not read.
            async with leaving:
                await connection.send(frame)

        self._sending.append((connection, asyncio.run_coroutine_threadsafe(send(), self._loop)))

    def receive(self, timeout_s: float, give_up_at: float = math.inf, *, away_s: float = math.inf) -> bytes:
        """The next frame.

        Raises ``TimeoutError`` where a connected device says nothing for so long, or one is away for ``away_s``,
        ``DeviceGoneError`` where a lost one does not come back, and what ``end`` was given. Each connection has
        ``timeout_s``, but none of them any longer than to ``give_up_at`` on ``clock``: coming and going wins nothing.
        """
        while True:
            connection = self.wait_for_device(away_s)
            until = min(self._clock() + timeout_s, give_up_at)
            try:
                receiving = None
                self._flush(until)
                receiving = self._begin_to_receive(connection)
                try:
                    return receiving.result(max(0.0, until - self._clock())).popleft()
                except TimeoutError:
                    receiving.cancel()
                    raise
                finally:
                    self._receiving = None  # it holds the frame
            except CancelledError:
                if self._ended is None:
                    raise
            except ConnectionClosed:
                self._lose(connection)
                del connection, receiving  # parked for long, it would keep the dead websocket

    def _begin_to_receive(self, connection: ServerConnection) -> Future[deque[bytes]]:
        with self._changed:
            if self._ended is not None:
                raise self._ended
            arriving, arrived = self._arriving, self._arrived

            async def receive() -> deque[bytes]:
                # Whoever gave up waiting may not have left yet; what came for that one then is for the next.
                async with arriving:
                    if not arrived:
                        arrived.append(await connection.recv(decode=False))
                return arrived

            self._receiving = asyncio.run_coroutine_threadsafe(receive(), self._loop)
            return self._receiving

    def disconnect(self, refusal: RefusedError | RemoteProtocolError) -> None:
        """Tell the device to come again, and close the connection; the session is parked.

        For as long as any other from the time on at which the device is told to come.
        """
        with self._changed:
            connection = self._connection
            self._sent_away_s = _within_limits(getattr(refusal, "retry_after_s", None)) or 0.0
        if connection is not None:
            logger.info(
                "session %s of %s: disconnected, to connect again later: %s: %s", self._name, self._device,
                refusal.code, refusal, extra={"device": self._device, "session": self._name},
            )  # fmt: skip
            self._lose(connection)
            asyncio.run_coroutine_threadsafe(close_with_error(connection, as_refusal(refusal)), self._loop)

    def wait_for_device(self, seconds: float = math.inf) -> ServerConnection:
        """Wait until there is a connection. Raises as ``receive``."""
        with self._changed:
            began = self._clock()
            give_up_at = began + seconds
            while self._connection is None and self._ended is None:
                # Another thread may send the device away meanwhile, for longer.
                if (left_s := give_up_at - self._clock()) <= 0:
                    raise TimeoutError
                self._changed.wait(min(left_s, self._left_s(began)))
            if self._ended is not None:
                raise self._ended
            assert self._connection is not None
            return self._connection

    def _left_s(self, began: float) -> float:
        """For how long a device may stay away that has been since ``began``. Raises ``DeviceGoneError`` after that."""
        stays_s = self._park_s + self._sent_away_s
        if (left_s := began + stays_s - self._clock()) <= 0:
            raise DeviceGoneError(f"it did not come back within {stays_s:.0f} s")
        return left_s

    def run_on_loop(self, function: Callable[[], T]) -> T:
        """What ``function`` gives, which is for the event loop."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def _flush(self, until: float) -> None:
        """Wait for what was sent to leave, all but ``frames_ahead``. Raises ``ConnectionClosed`` or ``TimeoutError`` if
        it does not."""
        while True:
            with self._changed:
                if not self._sending or (len(self._sending) <= self._frames_ahead and not self._sending[0][1].done()):
                    return
                first = connection, sent = self._sending[0]
            try:
                sent.result(max(0.0, until - self._clock()))
            except ConnectionClosed:
                if connection is self._connection:
                    raise
            with self._changed:
                if self._sending and self._sending[0] is first:  # not before: it may take longer than this one waits
                    self._sending.popleft()

    def _lose(self, connection: ServerConnection) -> None:
        with self._changed:
            if self._connection is connection:
                self._connection = None
                self._sending.clear()  # a dead websocket, as well
                self.times_lost += 1
                self.parked_at = self._clock()

    def interrupt(self, error: Exception) -> None:
        """Make ``receive`` raise ``error``, in whichever thread waits there now or will; the connection stays."""
        with self._changed:
            self._ended = self._ended or error
            self._changed.notify_all()
            if (receiving := self._receiving) is not None:
                receiving.cancel()
        self._loop.call_soon_threadsafe(self._wake)

    # -- the event loop ----------------------------------------------------------------------------------

    async def wait_for_frame(self, seconds: float) -> None:
        """Wait, in no thread, until there is a frame for ``receive``.

        Raises ``TimeoutError`` where none comes in time, whether the device is there or not, and else as ``receive``.
        """
        self._idle = asyncio.current_task()
        try:
            async with asyncio.timeout(seconds):
                while self._ended is None and not await self._frame_arrives():
                    pass
        except asyncio.CancelledError:
            if self._ended is None or self._idle is None:
                raise
            self._idle.uncancel()
        finally:
            self._idle = None
        if self._ended is not None:
            raise self._ended

    async def _frame_arrives(self) -> bool:
        """Wait for a frame of the present connection, or for another connection; False: look again."""
        with self._changed:
            connection, arriving, arrived = self._connection, self._arriving, self._arrived
        if connection is None:
            await self._wait_until_back()
            return False
        try:
            async with arriving:
                if not arrived:
                    arrived.append(await connection.recv(decode=False))
            return True
        except ConnectionClosed:
            self._lose(connection)
            return False

    async def _wait_until_back(self) -> None:
        began = self._clock()
        while self._connection is None:
            self._back = self._loop.create_future()
            try:
                # In the meantime it may have been sent away, for longer.
                async with asyncio.timeout(self._left_s(began)):
                    await self._back
            except TimeoutError:
                if self._connection is None:  # else it came at the last moment
                    self._left_s(began)

    def _wake(self) -> None:
        if self._idle is not None:
            self._idle.cancel()

    def handle_closed(self, connection: ServerConnection) -> None:
        """The connection has ended. The session counts as parked from now on, whatever its thread does at the moment;
        what has come over it can still be read."""
        with self._changed:
            if self._connection is connection and self.parked_at is None:
                self.parked_at = self._clock()

    def attach(self, connection: ServerConnection, missing: Callable[[], Sequence[bytearray]]) -> None:
        """Go on over another connection, with the frames that the device is ``missing``.

        They are asked for while the session's thread cannot send: a frame that it makes meanwhile is either among them
        or goes over the new connection. The old one is dropped without an ``Error``: a device that comes back no longer
        reads it.
        """
        with self._changed:
            frames = missing()
            old, self._connection = self._connection, connection
            self.parked_at, self._sent_away_s = None, 0.0
            self._sending.clear()
            self._leaving, self._arriving, self._arrived = asyncio.Lock(), asyncio.Lock(), deque()
            for frame in frames:
                self._begin_to_send(connection, frame)
            self._changed.notify_all()
            self.times_lost += old is not None
        if self._back is not None and not self._back.done():
            self._back.set_result(None)
        if old is not None:
            old.transport.abort()

    def end(self, error: Exception) -> None:
        """Make the session raise ``error`` where it waits for its device, now or the next time.

        The device is told of a ``RefusedError``, and of nothing else.
        """
        with self._changed:
            self._ended = error
            connection, self._connection = self._connection, None
            self._changed.notify_all()
        self._wake()
        if connection is not None:
            refusal = error if isinstance(error, RefusedError) else None
            self._closing_tasks.keep(self._loop.create_task(close_with_error(connection, refusal)))


def _within_limits(retry_after_s: float | None) -> float | None:
    return None if retry_after_s is None else min(retry_after_s, m.MAX_RETRY_AFTER_S)


def as_refusal(error: RefusedError | RemoteProtocolError | NonFiniteError) -> RefusedError:
    """What a device is told of an error that ends its connection or session."""
    match error:
        case RefusedError():
            return error
        case RemoteProtocolError():
            return RefusedError(str(error), error.code, retryable=error.retryable)
        case NonFiniteError():
            return RefusedError(str(error), m.ErrorCode.NON_FINITE)


async def close_with_error(connection: ServerConnection, refusal: RefusedError | None) -> None:
    """Tell a device why it loses the connection, and close it; one that does not read is not waited for."""
    with contextlib.suppress(ConnectionClosed, TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            if refusal is not None:
                error = m.Error(
                    code=refusal.code,
                    message=str(refusal)[:1024],
                    retryable=refusal.retryable,
                    retry_after_s=_within_limits(refusal.retry_after_s),
                )
                await connection.send(Session(Side.CLOUD).send(error))
            code = 1000 if refusal is None else 1001 if refusal.code == m.ErrorCode.SHUTTING_DOWN else 1008
            await connection.close(code, refusal.code if refusal else "")
            return
    connection.transport.abort()
