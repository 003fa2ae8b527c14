"""Answers of several sessions, computed together: what asks for the same blocks at the same time runs side by side.

::

    session 1   ── forward passes ──┐                                     ┌── goes on once all of its own have run
    session 2   ── forward passes ──┼── one of them leads: round by round ┼──
    session 3   ── forward passes ──┘   it runs what is next of each      └──

Who leads holds the gate of all sessions, and hands it on from time to time: whoever trains, or asks something else,
comes in between two tokens of an answer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch

from dlora.cloud.model.parts import ModelParts
from dlora.cloud.model.side_by_side import SideBySide
from dlora.protocol.errors import ExportError

from .forward import Forward, Forwards, run_side_by_side
from .gate import ComputeGate
from .single_rows import SingleRows

logger = logging.getLogger("dlora.cloud")

_MOST_WAIT_S: Final = 1e-3
"""How long a round waits for others who are answered just now. A pass of a small model takes thirty times that."""
_MOST_PASSED_OVER: Final = 2
_MOST_HELD_S: Final = 0.1
"""How long the gate is held while others wait for it, and the round that is under way."""


class _Asking:
    """Forward passes of one session that wait to be run.

    Attributes:
        next: of these; None once all have run, or one has failed with ``error``.
        passed_over: in how many rounds since its last.
    """

    def __init__(self, forwards: Forwards, count_idle: Callable[[float], None], clock: Callable[[], float]) -> None:
        self.next: Forward | None = None
        self.error: BaseException | None = None
        self.passed_over = 0
        self._forwards = forwards
        self._count_idle = count_idle
        self._clock = clock
        self._since = clock()
        self.go_on(0.0)

    def go_on(self, computed_s: float) -> None:
        """Make the next one; for the last ``computed_s`` was computed."""
        self.count(computed_s)
        self.passed_over = 0
        try:
            self.next = next(self._forwards, None)
        except Exception as error:  # whatever it makes of what has run
            self.fail(error)
        self._since = self._clock()

    def count(self, computed_s: float) -> None:
        """Count what has passed and was not computed for it."""
        now = self._clock()
        self._count_idle(now - self._since - computed_s)
        self._since = now

    def fail(self, error: BaseException) -> None:
        """No other runs."""
        self.next, self.error = None, error


class SharedGate:
    """A gate for micro-batches that answer: see ``Gate``.

    Args:
        gate: of all sessions.
        most_rows: tokens that run side by side; a longer forward pass runs alone.
        clock: seconds that never go back.

    Attributes:
        most_tokens: of a context that can be run so.
    """

    def __init__(
        self,
        gate: ComputeGate,
        side_by_side: SideBySide,
        single_rows: SingleRows,
        most_rows: int,
        clock: Callable[[], float],
    ) -> None:
        self.most_tokens = side_by_side.most_tokens
        self._gate = gate
        self._side_by_side = side_by_side
        self._single_rows = single_rows
        self._most_rows = most_rows
        self._clock = clock
        self._computing = 0  # micro-batches that do not wait for their device
        self._waiting: list[_Asking] = []
        self._has_leader = False
        lock = threading.Lock()
        self._asked, self._ended = threading.Condition(lock), threading.Condition(lock)

    @classmethod
    def of(
        cls, gate: ComputeGate, parts: ModelParts | None, most_rows: int, clock: Callable[[], float]
    ) -> SharedGate | None:
        """None where the base model cannot be run so, or ``most_rows`` is 0."""
        side_by_side = SideBySide.of(parts) if most_rows else None
        if parts is None or side_by_side is None:
            return None
        return cls(gate, side_by_side, SingleRows.of(parts.base), most_rows, clock)

    @contextmanager
    def computing(self) -> Iterator[None]:
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._count(-1)
        try:
            yield
        finally:
            self._count(1)

    def run(self, forwards: Forwards, count_idle: Callable[[float], None]) -> None:
        """Raises what they do."""
        asking = _Asking(forwards, count_idle, self._clock)
        if asking.next is not None and not self._is_led(asking):
            self._lead(asking)
        asking.count(0.0)
        error, asking.error = asking.error, None
        if error is not None:
            try:
                raise error
            finally:  # else it would hold itself, and a whole context with it, until Python looks for cycles
                del error, asking

    def _is_led(self, asking: _Asking) -> bool:
        """Wait until all have run; False where nobody leads any more."""
        with self._ended:
            self._waiting.append(asking)
            self._asked.notify()
            self._ended.wait_for(lambda: asking.next is None or not self._has_leader)
            self._has_leader = self._has_leader or asking.next is not None
            return asking.next is None

    def _lead(self, own: _Asking) -> None:
        try:
            while own.next is not None:
                with self._gate.computing():
                    until = self._clock() + _MOST_HELD_S
                    self._run_round()
                    while own.next is not None and not (self._gate.is_wanted and self._clock() >= until):
                        self._run_round()
        finally:
            with self._ended:
                self._has_leader = False
                self._ended.notify_all()

    def _run_round(self) -> None:
        """Run what is next of some, and make what follows."""
        chosen = self._choose()
        try:
            for asking, computed_s in zip(chosen, self._run_next(chosen), strict=True):
                if asking.next is None:
                    asking.count(computed_s)
                else:
                    asking.go_on(computed_s)
        except BaseException as error:
            for asking in chosen:
                asking.fail(error)
            raise
        finally:
            with self._ended:
                self._waiting += [asking for asking in chosen if asking.next is not None]
                self._ended.notify_all()

    def _choose(self) -> list[_Asking]:
        """Those that ask for the same blocks as most do, so that who is some blocks behind can catch up; or as one does
        that was passed over before."""
        with self._asked:
            self._asked.wait_for(lambda: len(self._waiting) >= self._computing, _MOST_WAIT_S)
            groups: dict[tuple[int, int | None], list[_Asking]] = {}
            for asking in sorted(self._waiting, key=lambda asking: -asking.passed_over):
                groups.setdefault(_next_of(asking).blocks, []).append(asking)
            first, *_ = groups.values()
            group = first if first[0].passed_over >= _MOST_PASSED_OVER else max(groups.values(), key=len)
            chosen, rows = list[_Asking](), 0
            for asking in group:
                tokens = _next_of(asking).tokens
                if not chosen or rows + tokens <= self._most_rows:
                    chosen.append(asking)
                    rows += tokens
            self._waiting = [asking for asking in self._waiting if asking not in chosen]
            for asking in self._waiting:
                asking.passed_over += 1
        return chosen

    def _run_next(self, chosen: Sequence[_Asking]) -> list[float]:
        """Run what is next of these; gives the seconds that were computed for each: its part is that of its tokens,
        however long its context is."""
        forwards, began = [_next_of(asking) for asking in chosen], self._clock()
        try:
            self._run(forwards)
        except Exception as error:
            if len(chosen) == 1:
                chosen[0].fail(error)
                return [self._clock() - began]
            if isinstance(error, ExportError):  # as it was not when it was tried
                logger.warning("answers are computed one by one from now on: %s", error)
                self._most_rows = 0
            return [self._run_next([asking])[0] for asking in chosen]  # whose fault it is shows where each runs alone
        seconds, rows = self._clock() - began, sum(forward.tokens for forward in forwards)
        return [seconds * forward.tokens / rows for forward in forwards]

    def _run(self, forwards: Sequence[Forward]) -> None:
        if len(forwards) == 1:
            forwards[0].run(self._single_rows)
        else:
            run_side_by_side(self._side_by_side, forwards)
        if forwards[0].base.device.type == "cuda":  # or the first who takes something from it would wait for all
            torch.cuda.synchronize(forwards[0].base.device)

    def _count(self, change: int) -> None:
        with self._asked:
            self._computing += change
            self._asked.notify()


def _next_of(asking: _Asking) -> Forward:
    assert asking.next is not None  # it waits
    return asking.next
