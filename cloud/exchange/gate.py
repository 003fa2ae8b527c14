"""Who may compute: one session at a time, for on a CPU the cores are shared, and on one GPU the device.

What those that answer do between two forward passes (``shared_gate.py``) is little, and waits for no turn.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from .forward import Forwards


class Gate(Protocol):
    """What a micro-batch waits for."""

    def computing(self) -> AbstractContextManager[None]:
        """Within, the micro-batch computes."""

    def waiting(self) -> AbstractContextManager[None]:
        """Within ``computing``: let others compute for as long as the device is waited for."""

    def run(self, forwards: Forwards, count_idle: Callable[[float], None]) -> None:
        """Within ``computing``: run forward passes. ``count_idle`` is told the seconds that others were computed for,
        before what follows a pass runs: that may be in another thread than this one, which waits."""


class ComputeGate:
    """Lets one compute at a time; the others wait their turn, which comes in the order in which they asked.

    Attributes:
        changes: how often a micro-batch has begun or ended to compute so far.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._lock = threading.Lock()
        self._is_taken = False
        self._turns: deque[threading.Event] = deque()

    @contextmanager
    def computing(self) -> Iterator[None]:
        self._take()
        self.changes += 1
        try:
            yield
        finally:
            self.changes += 1
            self._hand_on()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._hand_on()
        try:
            yield
        finally:
            self._take()

    def run(self, forwards: Forwards, count_idle: Callable[[float], None]) -> None:
        for forward in forwards:
            forward.run()

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a turn."""
        return bool(self._turns)

    def _take(self) -> None:
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return
            turn = threading.Event()
            self._turns.append(turn)
        turn.wait()

    def _hand_on(self) -> None:
        with self._lock:
            if self._turns:
                self._turns.popleft().set()
            else:
                self._is_taken = False
