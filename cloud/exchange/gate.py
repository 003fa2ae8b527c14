"""Who may compute: one session at a time, for on a CPU the cores are shared, and on one GPU the device.

Those that train hold much memory until their backward pass: they end what they have begun before others begin.

What those that answer do between two forward passes (``shared_gate.py``) is little, and waits for no turn.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
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
        self._turns: deque[_Turn] = deque()

    @contextmanager
    def computing(self, *, begins_graph: bool = False) -> Iterator[None]:
        self._take(_Turn(begins_graph=begins_graph))
        self.changes += 1
        try:
            yield
        finally:
            self.changes += 1
            self._hand_on()

    @contextmanager
    def waiting(self, *, has_graph: bool = False) -> Iterator[None]:
        self._hand_on()
        try:
            yield
        finally:
            self._take(_Turn(has_graph=has_graph))

    def run(self, forwards: Forwards, count_idle: Callable[[float], None]) -> None:
        for forward in forwards:
            forward.run()

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a turn."""
        return bool(self._turns)

    def _take(self, turn: _Turn) -> None:
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return
            self._turns.append(turn)
        turn.came.wait()

    def _hand_on(self) -> None:
        with self._lock:
            if self._turns:
                turn = self._next()
                self._turns.remove(turn)
                turn.came.set()
            else:
                self._is_taken = False

    def _next(self) -> _Turn:
        """The first in line; but where one waits that has a graph, nobody begins another."""
        may_begin = not any(turn.has_graph for turn in self._turns)
        return next(turn for turn in self._turns if may_begin or not turn.begins_graph)


class TrainingGate:
    """The gate of all sessions, for micro-batches whose graph waits for the backward pass, and takes much memory.

    One that has begun goes before those that have not, so that only as many are under way as keep the cores busy. None
    waits for ever: who has begun comes to an end, and all others keep their place in line.
    """

    def __init__(self, gate: ComputeGate) -> None:
        self._gate = gate
        self.run = gate.run

    def computing(self) -> AbstractContextManager[None]:
        return self._gate.computing(begins_graph=True)

    def waiting(self) -> AbstractContextManager[None]:
        return self._gate.waiting(has_graph=True)


@dataclass(eq=False)
class _Turn:
    """Of one that waits: whether it begins a graph, or has begun one."""

    begins_graph: bool = False
    has_graph: bool = False
    came: threading.Event = field(default_factory=threading.Event)
