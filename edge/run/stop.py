"""Ctrl-C and SIGTERM while a run trains: the first asks to stop when the step is done, the second interrupts."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from dlora.protocol import interrupts


class StopRequest:
    """Whether somebody asked to stop, with SIGINT or SIGTERM."""

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, Any] = {}

    def is_requested(self) -> bool:
        return self._requested

    @contextlib.contextmanager
    def stop_on_signal(self) -> Iterator[None]:
        """Within, the first signal asks to stop after the step, and the second one interrupts."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle_signal) for number in handled}
        try:
            yield
        finally:
            for number, handler in self._previous.items():
                if signal.getsignal(number) == self._handle_signal:  # and not ignored by now
                    signal.signal(number, handler)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._requested:
            self._requested = True
        elif self._previous[number] is interrupts.raise_interrupt:
            interrupts.raise_interrupt(number, frame)
        else:
            raise KeyboardInterrupt
