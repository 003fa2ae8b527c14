"""Gives the messages of a session to its micro-batches, with a deadline for everything that is waited for.

Several threads may share a session, one a micro-batch. Whoever waits for a message reads the transport, one at a time,
and leaves what is another's to that one. With one micro-batch at a time nothing is ever handed from thread to thread.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from dlora.cloud.exchange.gate import ComputeGate
from dlora.protocol import messages as m
from dlora.protocol.errors import DamagedFrameError, RefusedError, RemoteProtocolError
from dlora.protocol.micro_batch import Key
from dlora.protocol.session import Session

from .timeouts import Deadlines


class DeviceGaveUpError(Exception):
    """The device ended the session in the middle of a micro-batch, and said why."""


class Transport(Protocol):
    """Frames to and from one device, blocking; see ``SessionTransport``."""

    @property
    def times_lost(self) -> int: ...
    def send(self, frame: bytearray) -> None: ...
    def receive(self, timeout_s: float, give_up_at: float = ...) -> bytes: ...
    def disconnect(self, refusal: RefusedError | RemoteProtocolError) -> None: ...
    def wait_for_device(self) -> object: ...


class MessageRouter:
    """Sends a session's messages over its transport, and gives each that comes to the micro-batch that it is of."""

    def __init__(self, session: Session, transport: Transport, clock: Callable[[], float]) -> None:
        self.session = session
        self.transport = transport
        self.clock = clock
        self.began = clock()
        self._send_lock = threading.RLock()  # frames leave in the order of their numbers
        self._changed = threading.Condition()
        self._boxes: defaultdict[Key | None, deque[m.AnyMessage]] = defaultdict(deque)
        self._is_reading = False
        self._failure: BaseException | None = None

    def send(self, message: m.AnyMessage) -> None:
        """Send a message; returns at once."""
        with self._send_lock:
            self.transport.send(self.session.send(message))

    def fail(self, error: BaseException) -> None:
        """Make everyone who waits for a message, now or later, raise ``error``."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def close(self) -> None:
        """Forget what came, and why the session failed.

        An error holds the frames that it came through, and they the graph of a micro-batch, whose nodes hold this
        router: a cycle through autograd's C++ that Python's collector cannot see.
        """
        with self._changed:
            self._failure = None
            self._boxes.clear()

    def receive(self, key: Key | None, seconds: float, give_up_at: float = math.inf) -> m.AnyMessage | None:
        """The next message of a micro-batch, or, for None, one that begins something; None where there is none in time.

        A frame that came before is no answer: it does not begin the time anew. Another connection does.
        """
        left_s = seconds
        while True:
            began, times_lost = self.clock(), self.transport.times_lost
            if not self._wait_for_turn_to_read(key, min(left_s, give_up_at - began)):
                return self._pop_message(key)
            try:
                message = self._read(left_s, give_up_at)
            except TimeoutError:
                return None
            except BaseException as error:
                self.fail(error)
                raise
            finally:
                with self._changed:
                    self._is_reading = False
                    self._changed.notify_all()
            if isinstance(message, m.Error):  # the device gives up, which everyone must know
                self.fail(DeviceGaveUpError(message.message))
                return message
            if message is not None and (owner := _key_of(message)) == key:
                return message
            if message is not None:
                with self._changed:
                    self._boxes[owner].append(message)
            here = self.transport.times_lost == times_lost  # else it is another connection, and was away in between
            left_s = max(0.0, left_s - (self.clock() - began)) if here else seconds

    def _wait_for_turn_to_read(self, key: Key | None, seconds: float) -> bool:
        """Wait until there is a message for us, or nobody reads: whether it is our turn to read."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._boxes.get(key) or not self._is_reading or self._failure,
                min(max(0.0, seconds), _MAX_LOCK_WAIT_S),
            )
            if self._boxes.get(key):
                return False
            if self._failure is not None:
                raise self._failure
            if self._is_reading:
                return False
            self._is_reading = True
            return True

    def _pop_message(self, key: Key | None) -> m.AnyMessage | None:
        with self._changed:
            box = self._boxes.get(key)
            message = box.popleft() if box else None
            if not box:
                self._boxes.pop(key, None)
            return message

    def _read(self, seconds: float, give_up_at: float) -> m.AnyMessage | None:
        """The next message of the device; None for one that came before, or that was damaged on its way."""
        frame = self.transport.receive(seconds, give_up_at)
        try:
            with self._send_lock:
                return self.session.receive(frame)
        except DamagedFrameError as damage:
            self.transport.disconnect(damage)
            return None


class MicroBatchMessages:
    """The device's end of one micro-batch: what the micro-batch says goes out at once, and what it waits for has a
    deadline, after which the device is told to come again, and after longer the session ends.

    Made when the micro-batch begins to wait for its first turn to compute.

    Args:
        arrived: when its first message was there.

    Attributes:
        waited_s: for the device so far; idle_s: for the device and for the gate.
    """

    def __init__(
        self, router: MessageRouter, key: Key, gate: ComputeGate, deadlines: Deadlines, arrived: float
    ) -> None:
        self.waited_s = 0.0
        self.idle_s = 0.0
        self._times: list[float] = [arrived] * 3
        self._began = router.clock()
        self._router = router
        self._clock = router.clock
        self._key = key
        self._gate = gate
        self._deadlines = deadlines

    @property
    def computed_s(self) -> float:
        """Seconds that were computed so far."""
        return min(max(0.0, self._clock() - self._began - self.idle_s), m.MAX_SECONDS)

    @property
    def queued_s(self) -> float:
        """Seconds that the gate was waited for so far."""
        return min(max(0.0, self.idle_s - self.waited_s), m.MAX_SECONDS)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within, the micro-batch computes; until its first turn comes, it waits."""
        began = self._clock()
        with self._gate.computing():
            now = self._clock()
            self.idle_s += now - began
            self._times += (began, began, now)
            yield

    def take_times(self) -> tuple[float, ...]:
        """As ``DeviceMessages`` has it."""
        opening = self._router.session.opened_with
        times, self._times = self._times, []
        if opening is None or not opening.times:
            return ()
        since = (at - self._router.began for at in (*times[-m.MAX_TIMES + 1 :], self._clock()))
        return tuple(min(max(0.0, at), m.MAX_SECONDS) for at in since)

    def send(self, message: m.ExchangeMessage) -> None:
        self._router.send(message)  # type: ignore[arg-type]

    def receive(self) -> m.AnyMessage:
        """The device's next message of this micro-batch. Raises ``DeviceGaveUpError``, and what the transport does."""
        transport = self._router.transport
        began, times_lost = self._clock(), transport.times_lost
        try:
            with self._gate.waiting():
                try:
                    message = self._await_answer(began + self._deadlines.all_answers.seconds - self.waited_s)
                finally:  # before the gate is waited for: what others compute is not the device's time
                    received = self._clock()
                    waited_s = received - began
                    self.waited_s += waited_s
        finally:
            now = self._clock()
            self.idle_s += now - began
            self._times += (began, received, now)
        if transport.times_lost == times_lost:  # else it tells of the network, not of the device
            self._deadlines.one_answer.observe(waited_s)
        if isinstance(message, m.Error):
            raise DeviceGaveUpError(message.message)
        return message

    def _await_answer(self, give_up_at: float) -> m.AnyMessage:
        """The next message; a device that is late is told to come again, and the clock starts anew."""
        late = RefusedError("the device did not answer in time", m.ErrorCode.DEADLINE, retryable=True)
        while self._clock() < give_up_at:
            message = self._router.receive(self._key, self._deadlines.one_answer.seconds, give_up_at)
            if message is not None:
                return message
            self._deadlines.one_answer.missed()
            self._router.transport.disconnect(late)
        self._deadlines.all_answers.missed()
        raise late


_MAX_LOCK_WAIT_S: Final = threading.TIMEOUT_MAX


def _key_of(message: m.AnyMessage) -> Key | None:
    """The micro-batch that a message belongs to; None for one that begins something."""
    if isinstance(message, m.ExchangeMessage) and not isinstance(message, m.Embeddings):
        return message.step, message.micro_batch
    return None
