"""Waiting for what another thread or process does, and a clock for those who need not wait."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

WITHIN_S = 200.0  # for what never comes, and not for what is slow on a busy machine


def eventually(holds: Callable[[], bool]) -> None:
    """Return as soon as it is true; fail where it is not within ``WITHIN_S``."""
    deadline = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.003)


@contextmanager
def loop_in_thread() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """An event loop in a thread of its own; gives what runs a coroutine there and waits for what it returns."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(WITHIN_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WITHIN_S)
        loop.close()


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
