"""Each frame of a session once and in order, over connections that come and go.

The frames of one direction are numbered from 1. A sender keeps a frame until the peer's ``ack`` covers it; after a
lost connection both sides say how far they got, and send again what the other does not have. A receiver takes the
next number only: a frame that it has already, with the same content, is passed over, because the answer to it was
sent or is kept; with other content it is refused.

A micro-batch is lock-step, or asks groups in waves, so that few frames are ever kept. This is not TCP's reliability
made again: TCP loses what was under way when a connection breaks, and does not tell which part arrived.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

from .errors import RemoteProtocolError
from .frames import Prefix

MAX_UNACKNOWLEDGED: Final = 8  # a micro-batch under way; an honest peer leaves 2 of each; a frame may have 50 MB
REMEMBERED_FRAMES: Final = 256
MAX_REPEATS: Final = 16  # in a row; a network that doubles frames makes one


def frame_count(window: int, groups: int = 0) -> int:
    """How many frames of one direction so many micro-batches have under way at most, of ``groups`` that are asked at
    once, in two backward passes after one another."""
    return window * (MAX_UNACKNOWLEDGED + 2 * groups)


class Link:
    """One side's end; ``sent`` and ``received`` are the last number in each direction, 0 before the first.

    A server's session computes in one thread while its device comes back in another, so the outbox has a lock.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0
        self._outbox: deque[tuple[int, bytearray]] = deque()
        self._checksums: deque[int] = deque(maxlen=REMEMBERED_FRAMES)
        self._lock = threading.Lock()
        self._limit = MAX_UNACKNOWLEDGED

    def set_limit(self, window: int, groups: int = 0) -> None:
        """Let so many micro-batches be under way at a time, as ``frame_count`` has it."""
        self._limit = frame_count(window, groups)

    @property
    def kept_bytes(self) -> int:
        """Of the frames that the peer has not acknowledged."""
        with self._lock:
            return sum(len(frame) for _, frame in self._outbox)

    def keep(self, frame: bytearray) -> None:
        """Keep the frame with the next number until it is acknowledged. Raises ``RemoteProtocolError`` where the peer
        has not acknowledged for too long: it must not be able to make us keep more and more."""
        with self._lock:
            if len(self._outbox) >= self._limit:
                raise RemoteProtocolError(f"the peer has acknowledged none of the last {self._limit} frames")
            self.sent += 1
            self._outbox.append((self.sent, frame))

    def is_repeat(self, prefix: Prefix) -> bool:
        """Whether the frame came before. Raises ``RemoteProtocolError`` if it can be neither that nor the next."""
        if prefix.ack > self.sent:
            raise RemoteProtocolError("an acknowledgement of a frame that was never sent")
        if prefix.seq == self.received + 1:
            return False
        age = self.received - prefix.seq
        if age < 0:
            raise RemoteProtocolError(f"frame {prefix.seq} when {self.received + 1} comes next")
        if age >= len(self._checksums) or self._checksums[-1 - age] != prefix.checksum:
            raise RemoteProtocolError(f"frame {prefix.seq} again, with other content")
        return True

    def accept(self, prefix: Prefix) -> None:
        """Take the next frame, and drop what it acknowledges."""
        self.received = prefix.seq
        self._checksums.append(prefix.checksum)
        with self._lock:
            while self._outbox and self._outbox[0][0] <= prefix.ack:
                self._outbox.popleft()

    def missing(self, received: int) -> list[bytearray]:
        """The frames after number ``received``, which the peer lacks, in order. Raises ``RemoteProtocolError`` if it
        cannot be: it acknowledged more before, or got what was never sent."""
        with self._lock:
            oldest = self._outbox[0][0] if self._outbox else self.sent + 1
            if not oldest - 1 <= received <= self.sent:
                raise RemoteProtocolError(f"a peer that has {received} frames, of {self.sent}")
            return [frame for number, frame in self._outbox if number > received]
