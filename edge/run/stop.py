"""Ctrl-C, SIGTERM, SIGHUP while a run trains: the first asks to stop when the step is done, the second interrupts."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from dlora.protocol import interrupts


class StopRequest:
    """Whether somebody asked to stop, with a signal."""

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
        self._previous = {number: signal.signal(number, self._handle_signal) for number in interrupts.not_ignored()}
        try:
            yield
        finally:
            for number, handler in self._previous.items():
                if signal.getsignal(number) == self._handle_signal:  # and not ignored by now
                    signal.signal(number, handler)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._requested:
            interrupts.leave_closed_terminal()
            self._requested = True
        elif number == signal.SIGHUP:
            pass  # it comes twice, from the system and from the shell, and nobody is there to insist
        elif self._previous[number] is interrupts.raise_interrupt:
            interrupts.raise_interrupt(number, frame)
        else:
            raise KeyboardInterrupt
