"""A terminal that is closed, as at the end of an ssh connection, stops a run and a server as SIGTERM does."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import CLOUD, EDGE, END_TIMEOUT_S, START_TIMEOUT_S, cloud_process, quiet_environment
from tiny import TinyFactory

from dlora.edge.training.checkpoint import list_checkpoints

EXIT_CODE = 130


class Terminal:
    """A command in a terminal of its own, in the foreground; one that ignores SIGHUP is as under ``nohup``."""

    def __init__(self, *command: object, ignores: bool) -> None:
        self._screen, other_end = pty.openpty()

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            if ignores:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)

        self.process = subprocess.Popen(
            list(map(str, command)), stdin=other_end, stdout=other_end, stderr=other_end, env=quiet_environment(),
            start_new_session=True, preexec_fn=take_terminal,
        )  # fmt: skip
        os.close(other_end)
        self.shown = ""

    def show_until(self, is_there: Callable[[], bool]) -> None:
        """Read what the command prints, as a terminal does, until something is there."""
        ends = time.monotonic() + START_TIMEOUT_S
        while not is_there():
            assert time.monotonic() < ends, self.shown
            if select.select([self._screen], [], [], 0.02)[0]:
                try:
                    self.shown += os.read(self._screen, 65536).decode(errors="replace")
                except OSError:  # the command has ended
                    raise AssertionError(self.shown) from None

    def end(self) -> None:
        """With SIGTERM."""
        self.process.terminate()
        with contextlib.suppress(OSError):  # it has ended
            while os.read(self._screen, 65536):
                pass
        os.close(self._screen)

    def close(self) -> None:
        """The system sends SIGHUP, and so does the shell."""
        os.close(self._screen)
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGHUP)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"w1 w2 w{number}"}) + "\n" for number in range(3, 9)))
    return path


@pytest.mark.parametrize("ignored", [False, True], ids=["obeyed", "under nohup"])
def test_run_saves_its_step(tiny: TinyFactory, data: Path, tmp_path: Path, ignored: bool) -> None:
    out = tmp_path / "out"
    metrics = out / "metrics.jsonl"
    with cloud_process(tiny().model, tmp_path / "server") as server:
        terminal = Terminal(
            EDGE, "train", "--bundle", tiny().bundle, "--server", server.url, "--data", data, "--out", out, "--steps",
            100_000, "--save-every", 100_000, "--kind", "lora", "--seed", 0, ignores=ignored,
        )  # fmt: skip
        terminal.show_until(lambda: metrics.is_file() and metrics.stat().st_size > 0)
        if ignored:
            check_that_it_goes_on(terminal, lambda: metrics.stat().st_size)
        else:
            terminal.close()
        assert terminal.process.wait(END_TIMEOUT_S) == EXIT_CODE
    (step, _), *_ = list_checkpoints(out / "checkpoints")
    assert step == len(metrics.read_text().splitlines()) > 0


@pytest.mark.parametrize("ignored", [False, True], ids=["obeyed", "under nohup"])
def test_server_drains(tiny: TinyFactory, tmp_path: Path, ignored: bool) -> None:
    terminal = Terminal(CLOUD, "serve", tiny().model, "--port", 0, "--state-dir", tmp_path, ignores=ignored)
    terminal.show_until(lambda: "listening on" in terminal.shown)
    if ignored:
        check_that_it_goes_on(terminal, lambda: time.monotonic_ns())
    else:
        terminal.close()
    assert terminal.process.wait(END_TIMEOUT_S) == 0


def check_that_it_goes_on(terminal: Terminal, progress: Callable[[], int]) -> None:
    """Past a SIGHUP; and end it with SIGTERM then."""
    before = progress()
    terminal.process.send_signal(signal.SIGHUP)
    terminal.show_until(lambda: progress() > before)
    assert terminal.process.poll() is None
    terminal.end()
