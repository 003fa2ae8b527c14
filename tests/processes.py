"""The real commands as real processes: forked from ones that have imported everything, or started as a shell does."""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
EDGE, CLOUD, EXPORT = (str(BIN / f"dlora-{package}") for package in ("edge", "cloud", "export"))
START_TIMEOUT_S = 60
END_TIMEOUT_S = 120  # for what hangs, and not for what is slow on a busy machine


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


class Command(subprocess.Popen[str]):
    """``Popen`` of one of the three commands, forked by a ``command_server``: in milliseconds.

    Any other program, and one with a ``PYTHONPATH`` of its own, which changes what is imported, is started as ever.
    For tests of how a command is started (a shell, a terminal of its own) there is ``Popen``.
    """

    def __init__(self, arguments: list[str], **options: Any) -> None:
        super().__init__(arguments, text=True, **{"env": quiet_environment(), **options})

    def _execute_child(self, arguments: list[str], *options: Any) -> None:
        """In place of fork and exec. ``options`` as Python 3.11 to 3.14 have them."""
        directory, environment = options[4:6]
        if arguments[0] not in (EDGE, CLOUD, EXPORT) or environment.get("PYTHONPATH") != _PYTHONPATH:
            super()._execute_child(arguments, *options)  # type: ignore[misc]
            return
        child_in, parent_in, parent_out, child_out, parent_err, child_err = options[9:15]
        streams = [given if given != -1 else number for number, given in enumerate((child_in, child_out, child_err))]
        package = Path(arguments[0]).name.removeprefix("dlora-")
        wanted = {
            "package": package, "arguments": arguments, "environment": dict(environment),
            "directory": str(Path(directory or "").absolute()),
        }  # fmt: skip
        asked = _command_server(package == "edge")
        try:
            with _asking:
                socket.send_fds(asked, [json.dumps(wanted).encode()], streams)
                self.pid = int(asked.recv(100))
            self._child_created = True
        finally:
            self._close_pipe_fds(child_in, parent_in, parent_out, child_out, parent_err, child_err)  # type: ignore[attr-defined]


_PYTHONPATH = os.environ.get("PYTHONPATH")
_asking = threading.Lock()
_PR_SET_CHILD_SUBREAPER = 36


@cache
def _command_server(for_edge: bool) -> socket.socket:
    """Started once a test process, which commands are then children of: it takes the orphans of those below it."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("this system gives orphans to nobody")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = [sys.executable, str(Path(__file__).with_name("command_server.py"))]
    server = subprocess.Popen(
        [*program, "edge" if for_edge else "cloud", str(theirs.fileno())], pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=quiet_environment(),
    )  # fmt: skip
    theirs.close()

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


def run_command(
    command: Sequence[object], *, said: str | None = None, timeout_s: float = END_TIMEOUT_S, **options: Any
) -> Finished:
    """Run one of the commands, given by its path, to its end; ``said``: on its standard input."""
    pipe = subprocess.PIPE
    given = pipe if said is not None else None
    with Command([str(each) for each in command], stdin=given, stdout=pipe, stderr=pipe, **options) as process:
        try:
            stdout, stderr = process.communicate(said, timeout=timeout_s)
            return Finished(process.returncode, stdout, stderr)
        except BaseException:
            process.kill()
            raise


def run_cloud(*arguments: object, **environment: str) -> Finished:
    """Run ``dlora-cloud`` to its end."""
    return run_command([CLOUD, *arguments], env={**quiet_environment(), **environment})


def run_export(*arguments: object) -> Finished:
    """Run ``dlora-export`` to its end."""
    return run_command([EXPORT, *arguments])


def run_edge(*arguments: object, timeout_s: float = END_TIMEOUT_S, **environment: str) -> Finished:
    """Run ``dlora-edge`` to its end."""
    return run_command([EDGE, *arguments], timeout_s=timeout_s, env={**quiet_environment(), **environment})


def start_edge(*arguments: object) -> subprocess.Popen[str]:
    """Start ``dlora-edge``; ``finish`` waits for it."""
    return Command([EDGE, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> Finished:
    stdout, stderr = process.communicate(timeout=END_TIMEOUT_S)
    return Finished(process.returncode, stdout, stderr)


def quiet_environment() -> dict[str, str]:
    """This environment; threads that wait sleep, as server and device share the cores."""
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class CloudProcess:
    """A ``dlora-cloud`` that listens; what it said first, and the file that its log goes to."""

    process: subprocess.Popen[str]
    hello: dict[str, Any]
    log: Path

    @property
    def url(self) -> str:
        return str(self.hello["url"])

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ask it to stop; gives its exit code."""
        self.process.send_signal(number)
        return self.process.wait(END_TIMEOUT_S)


@contextmanager
def cloud_process(model: Path, directory: Path, *arguments: object) -> Iterator[CloudProcess]:
    """``dlora-cloud serve`` on a free port; all that it writes lies under ``directory``."""
    for name in ("state", "work", "tmp", "home"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    log = directory / "log"
    environment = {**quiet_environment(), "TMPDIR": str(directory / "tmp"), "HOME": str(directory / "home")}
    with log.open("w") as stderr:
        process = Command(
            [CLOUD, "serve", str(model), "--port", "0", "--threads", "1", "--json",
             "--state-dir", str(directory / "state"), *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=stderr, cwd=directory / "work", env=environment,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        yield CloudProcess(process, json.loads(line), log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(END_TIMEOUT_S)
        if process.stdout is not None:
            process.stdout.close()
