"""Ends a write that a server holds up, some seconds after somebody asked to stop."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Final

UNBLOCKED_BYTES: Final = 16 << 10  # what the system takes without asking the peer


class WriteWatch:
    """Watches one connection's writes: they have no deadline, and a server that takes a few bytes now and then would
    keep us for as long as it likes.

    One thread, from the first large frame on: one a frame was a third of the processor time of a step of small cores.

    Args:
        should_stop: whether somebody asked to stop; check_every_s: how often that is looked at.
        grace_s: how long one write may still take then.
    """

    def __init__(self, should_stop: Callable[[], bool], check_every_s: float, *, grace_s: float) -> None:
        self._should_stop = should_stop
        self._check_every_s = check_every_s
        self._grace_s = grace_s
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._tcp: socket.socket | None = None
        self._count = 0

    @contextlib.contextmanager
    def writing(self, tcp: socket.socket, nbytes: int) -> Iterator[None]:
        """Within, a frame of ``nbytes`` is written to ``tcp``, which is shut down if that must end."""
        if nbytes <= UNBLOCKED_BYTES:
            yield
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="write-watch", daemon=True)
            self._thread.start()
        self._count += 1
        self._tcp = tcp
        try:
            yield
        finally:
            self._tcp = None

    def close(self) -> None:
        """End the thread: nothing is written any more."""
        self._closed.set()

    def _watch(self) -> None:
        watched, waited_s = 0, 0.0
        while not self._closed.wait(self._check_every_s):
            tcp, count = self._tcp, self._count
            if tcp is None or count != watched or not self._should_stop():
                watched, waited_s = count, 0.0
                continue
            waited_s += self._check_every_s
            if waited_s >= self._grace_s:
                with contextlib.suppress(OSError):
                    tcp.shutdown(socket.SHUT_RDWR)
