"""A command in a terminal of its own: what it shows, what is typed there, and the window that is closed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from processes import END_TIMEOUT_S, START_TIMEOUT_S, quiet_environment


class Terminal:
    """A command in the foreground; one that ignores SIGHUP is as under ``nohup``.

    Attributes:
        shown: all that was read of what it shows.
    """

    def __init__(self, *command: object, ignores: bool = False) -> None:
        self._screen, other_end = pty.openpty()
        self._waited_for = 0  # characters of ``shown``

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores else signal.SIG_DFL)

        self.process = subprocess.Popen(
            list(map(str, command)), stdin=other_end, stdout=other_end, stderr=other_end, start_new_session=True,
            env={**quiet_environment(), "TERM": "dumb"}, preexec_fn=take_terminal,
        )  # fmt: skip
        os.close(other_end)
        self.shown = ""

    def show_until(self, is_there: Callable[[], bool]) -> None:
        """Read what the command prints, as a terminal does, until something is there."""
        ends = time.monotonic() + START_TIMEOUT_S
        while not is_there():
            assert time.monotonic() < ends, self.shown
            self._read(0.02)

    def wait_for(self, text: str, *, interrupting: bool = False) -> None:
        """Read until it stands there, after all that was waited for before.

        ``interrupting``: by Ctrl-C, again where nothing comes of it: one in the moment before the terminal waits for a
        key is only noticed with the next key.
        """
        ends, heard = time.monotonic() + END_TIMEOUT_S, False
        while text not in self.shown[self._waited_for :]:
            assert time.monotonic() < ends, f"{text!r} did not come after {self.shown[self._waited_for :]!r}"
            if interrupting and not heard:
                self.process.send_signal(signal.SIGINT)
            heard = self._read(2.0)
        self._waited_for = self.shown.index(text, self._waited_for) + len(text)

    def _read(self, wait_s: float) -> bool:
        """Read what comes by then; False where nothing does."""
        if not select.select([self._screen], [], [], wait_s)[0]:
            return False
        try:
            self.shown += os.read(self._screen, 65536).decode(errors="replace")
        except OSError:  # the command has ended
            raise AssertionError(self.shown) from None
        return True

    def show_to_its_end(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            while os.read(self._screen, 65536):
                pass

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def close(self) -> None:
        """The system sends SIGHUP, and so does the shell."""
        os.close(self._screen)
        self.process.send_signal(signal.SIGHUP)


@contextmanager
def terminal(*command: object, ignores: bool = False) -> Iterator[Terminal]:
    """A command in a terminal; in the end it is no more, whatever happened."""
    window = Terminal(*command, ignores=ignores)
    try:
        yield window
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(window.process.pid, signal.SIGKILL)
        window.process.wait(END_TIMEOUT_S)
