"""Who may compute: one session at a time, for on a CPU the cores are shared, and on one GPU the device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ComputeGate:
    """Lets one micro-batch compute at a time; the others wait their turn.

    Attributes:
        changes: how often a micro-batch has begun or ended to compute so far.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._free = threading.Lock()

    @contextmanager
    def computing(self) -> Iterator[None]:
        with self._free:
            self.changes += 1
            try:
                yield
            finally:
                self.changes += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within ``computing``: let others compute for as long as the device is waited for."""
        self._free.release()
        try:
            yield
        finally:
            self._free.acquire()
