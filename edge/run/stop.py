"""Ctrl-C, SIGTERM, SIGHUP while a run trains: the first asks to stop when the step is done, the second interrupts;
SIGHUP only asks."""

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
        self._asked = False  # with SIGINT or SIGTERM
        self._previous: dict[int, Any] = {}

    def is_requested(self) -> bool:
        if self._requested:
            interrupts.leave_closed_output()  # of `| tee log`, the reader may end a little later than we are told to
        return self._requested

    @contextlib.contextmanager
    def stop_on_signal(self) -> Iterator[None]:
        """Within, signals ask to stop after the step, and the second SIGINT or SIGTERM interrupts."""
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
        interrupts.leave_closed_output()
        self._requested = True
        if number == signal.SIGHUP:
            return  # the system sends it, and the shell again: nobody insists
        if not self._asked:
            self._asked = True
        elif self._previous[number] is interrupts.raise_interrupt:
            interrupts.raise_interrupt(number, frame)
        else:
            raise KeyboardInterrupt
