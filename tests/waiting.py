"""Waiting for what another thread or process does, and a clock for those who need not wait."""

from __future__ import annotations

import time
from collections.abc import Callable

WITHIN_S = 200.0  # for what never comes, and not for what is slow on a busy machine


def eventually(holds: Callable[[], bool]) -> None:
    """Return as soon as it is true; fail where it is not within ``WITHIN_S``."""
    deadline = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.003)


class StandingClock:
    """Seconds that pass when a test says so. They start where a server's that has run for months stands."""

    def __init__(self) -> None:
        self.now = 1e7

    def __call__(self) -> float:
        return self.now


class PassingClock:
    """A clock to give to what waits: it goes on as time does, and ``sleep`` moves it on at once."""

    def __init__(self) -> None:
        self.slept_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.slept_s

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
