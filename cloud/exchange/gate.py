"""Who may compute: one session at a time, for on a CPU the cores are shared, and on one GPU the device.

Those that train hold much memory until their backward pass: they end what they have begun before others begin.

What those that answer do between two forward passes (``shared_gate.py``) is little, and waits for no turn.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

from .forward import Forwards

FEW_GRAPHS: Final = 2
"""As many micro-batches keep the cores busy, where devices answer at once: one computes, the other's device does."""
QUIET_S: Final = 0.01
"""More begin only when none of those that have begun has come back from its device for so long. Near devices answer
sooner; of a far one all micro-batches begin one right after the other."""


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

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.changes = 0
        self._clock = clock
        self._graphs = 0
        self._graph_computed = clock()  # when one that had waited for its device did last
        self._lock = threading.Lock()
        self._computes: _Turn | None = None
        self._turns: deque[_Turn] = deque()

    @contextmanager
    def computing(self, *, begins_graph: bool = False) -> Iterator[None]:
        self._take(_Turn(begins_graph=begins_graph))
        self.changes += 1
        self._graphs += begins_graph
        try:
            yield
        finally:
            self.changes += 1
            self._graphs -= begins_graph
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
        """Whether somebody waits for a turn who may have it."""
        with self._lock:
            return self._next() is not None

    def _take(self, turn: _Turn) -> None:
        with self._lock:
            before = next((each for each in reversed(self._turns) if each.begins_graph), None)
            self._turns.append(turn)
            self._offer()
        if not turn.begins_graph:
            turn.came.wait()
            return
        if before is not None:  # only the first of those that begin looks at the clock again and again
            before.came.wait()
        while not turn.came.wait(QUIET_S):
            with self._lock:
                self._offer()

    def _hand_on(self) -> None:
        with self._lock:
            if self._computes is not None and self._computes.has_graph:
                self._graph_computed = self._clock()
            self._computes = None
            self._offer()

    def _offer(self) -> None:
        """If nobody computes, it is the turn of the first in line that may."""
        turn = self._next()
        if self._computes is None and turn is not None:
            self._computes = turn
            self._turns.remove(turn)
            turn.came.set()

    def _next(self) -> _Turn | None:
        may_begin = self._may_begin()
        return next((turn for turn in self._turns if may_begin or not turn.begins_graph), None)

    def _may_begin(self) -> bool:
        """Not while one waits that has a graph; and where a few have, once these have been quiet for a while."""
        if any(turn.has_graph for turn in self._turns):
            return False
        return self._graphs < FEW_GRAPHS or self._clock() - self._graph_computed >= QUIET_S


class TrainingGate:
    """The gate of all sessions, for micro-batches whose graph waits for the backward pass, and takes much memory.

    One that has begun goes before those that have not, so that only as many are under way as keep the cores busy; more
    where devices are far. None waits for ever: who has begun comes to an end, and all others keep their place in line.
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
