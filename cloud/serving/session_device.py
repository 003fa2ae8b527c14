"""The device of a session: messages to it, and each that comes for whom it is.

Several threads may share a session, one a micro-batch. Whoever waits for a message reads the transport, one at a time,
and leaves what is another's to that one. With one micro-batch at a time nothing is ever handed from thread to thread.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Final

from dlora.protocol import messages as m
from dlora.protocol.errors import DamagedFrameError, RefusedError, RemoteProtocolError
from dlora.protocol.micro_batch import Key
from dlora.protocol.session import Session

from .counts import KINDS, OTHER, Counts
from .transport import SessionTransport


class DeviceGaveUpError(Exception):
    """The device ended the session in the middle of a micro-batch, and said why."""


class SessionDevice:
    """Sends a session's messages over its transport, and gives each that comes to the micro-batch that it is of."""

    def __init__(
        self, session: Session, transport: SessionTransport, clock: Callable[[], float], counts: Counts
    ) -> None:
        self.session = session
        self.transport = transport
        self.counts = counts
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
            frame = self.session.send(message)
            self.transport.send(frame)
        self.counts.sent.add(len(frame), KINDS[type(message)])

    def disconnect(self, refusal: RefusedError | RemoteProtocolError) -> None:
        """Tell the device to come again, and close its connection; the session is parked."""
        self.counts.refusals.add(label=refusal.code)
        self.transport.disconnect(refusal)

    def fail(self, error: BaseException) -> None:
        """Make everyone who waits for a message, now or later, raise ``error``."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def close(self) -> None:
        """Forget what came, and why the session failed.

        An error holds the frames that it came through, and they the graph of a micro-batch, whose nodes hold this
        object: a cycle through autograd's C++ that Python's collector cannot see.
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
                message = self._pop_message(key)
                if message is None and self._was_away(times_lost) and self.clock() < give_up_at:
                    left_s = seconds  # while another read
                    continue
                return message
            try:
                # Where nothing else is under way nobody waits in a thread for a device that is away.
                message = self._read(left_s, give_up_at, math.inf if key is not None else seconds)
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

    def _was_away(self, times_lost: int) -> bool:
        """Whether the device is away, or was since it had been ``times_lost``."""
        return self.transport.times_lost != times_lost or self.transport.parked_at is not None

    @property
    def has_more(self) -> bool:
        """Whether a message that begins something was read already, and waits."""
        with self._changed:
            return bool(self._boxes.get(None))

    def raise_failure(self) -> None:
        """Raise what ``fail`` was given."""
        with self._changed:
            if self._failure is not None:
                raise self._failure

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

    def _read(self, seconds: float, give_up_at: float, away_s: float) -> m.AnyMessage | None:
        """The next message of the device; None for one that came before, or that was damaged on its way."""
        frame = self.transport.receive(seconds, give_up_at, away_s=away_s)
        try:
            with self._send_lock:
                message = self.session.receive(frame)
        except DamagedFrameError as damage:
            self.disconnect(damage)
            return None
        self.counts.received.add(len(frame), OTHER if message is None else KINDS[type(message)])
        return message


_MAX_LOCK_WAIT_S: Final = threading.TIMEOUT_MAX


def _key_of(message: m.AnyMessage) -> Key | None:
    """The micro-batch that a message belongs to; None for one that begins something."""
    if isinstance(message, m.ExchangeMessage) and not isinstance(message, m.Embeddings):
        return message.step, message.micro_batch
    return None
