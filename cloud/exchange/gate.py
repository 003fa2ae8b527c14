"""Who may compute: sessions share the cores, or the one GPU, without asking more of them than they have."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ComputeGate:
    """Lets ``width`` micro-batches compute at a time; the others wait their turn.

    Attributes:
        changes: how often a micro-batch has begun or ended to compute so far.
    """

    def __init__(self, width: int = 1) -> None:
        self.changes = 0
        self._free = threading.Semaphore(width)

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
