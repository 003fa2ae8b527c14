"""What Ctrl-C, SIGTERM and a terminal that is closed (SIGHUP) do to a command, from its first line to its last.

While it loads its modules, or a model, there is nothing to put in order, and libraries swallow exceptions or take them
for faults of their own: it *ends at once*. Where it writes files or talks to a server it is *interrupted*, with
``KeyboardInterrupt``. Once it is done, and Python clears up, all three are *ignored*: the exit code is decided.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

INTERRUPTED_EXIT_CODE: Final = 130
INTERRUPTED: Final = "interrupted"
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A progress bar may have hidden the terminal's cursor.
_CLEAR_LINE_AND_SHOW_CURSOR: Final = "\r\x1b[K\x1b[?25h"


def not_ignored() -> list[signal.Signals]:
    """The signals that this process obeys. Whoever starts it with one ignored means it: scripts do so with SIGINT for
    what runs in the background, ``nohup`` with SIGHUP."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def exit_on_signal() -> None:
    """From here on a signal ends this process at once, with one line and 130. For a command's main thread."""
    for number in not_ignored():
        signal.signal(number, _exit_process)


@contextmanager
def raise_on_signal() -> Iterator[None]:
    """Within, the first signal raises ``KeyboardInterrupt`` where it would end the process at once. Only in the main
    thread, which alone gets signals."""
    is_main = threading.current_thread() is threading.main_thread()
    ending = [number for number in SIGNALS if is_main and signal.getsignal(number) is _exit_process]
    for number in ending:
        signal.signal(number, raise_interrupt)
    try:
        yield
    finally:
        for number in ending:
            if signal.getsignal(number) is raise_interrupt:  # and not ignored since: then we are on our way out
                signal.signal(number, _exit_process)


def ignore_signals() -> None:
    """From here on signals do nothing: Python gives them back to the system before it has cleared up."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_closed_output() -> None:
    """Let what is still printed go nowhere where nobody can read it any more: a terminal that is closed, a pipe whose
    reader has ended. Writing there fails, and would end what is about to save its work."""
    for number in (1, 2):
        with contextlib.suppress(OSError):  # it was closed by whoever started us
            output = select.poll()
            output.register(number, 0)  # errors and hang-ups are told unasked
            if any(events & (select.POLLERR | select.POLLHUP) for _, events in output.poll(0)):
                null_device = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null_device, number)
                os.close(null_device)


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    """A handler that raises ``KeyboardInterrupt``, and ignores what comes after it."""
    leave_closed_output()
    ignore_signals()  # what follows puts things in order, and is to come to its end
    raise KeyboardInterrupt


def _exit_process(number: int, frame: FrameType | None) -> None:
    leave_closed_output()
    ignore_signals()  # one line is enough
    before = _CLEAR_LINE_AND_SHOW_CURSOR if os.isatty(2) else ""
    with contextlib.suppress(OSError):  # nobody reads it: end all the same
        os.write(2, f"{before}error: {INTERRUPTED}\n".encode())
    os._exit(INTERRUPTED_EXIT_CODE)
