"""The real commands as real processes: started as ever, or forked from one that has imported everything.

A fork takes milliseconds where a new Python with torch takes seconds, and dies of SIGKILL just the same. Beside what a
command line gives, a forked one can have its clocks shifted and be stopped at a file operation.
"""

from __future__ import annotations

import errno
import importlib
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import c_double
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, Final

from processes import quiet_environment

END_TIMEOUT_S: Final = 60.0
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["preloaded"])
# Starting a process asks after all others, and an exit code can be read only once.
_starting = threading.Lock()


class Clocks:
    """By how much a process's wall clock and monotonic clock are ahead of the machine's, in seconds."""

    def __init__(self) -> None:
        self._shifts = RawArray(c_double, 2)

    def jump(self, *, wall: float = 0.0, monotonic: float = 0.0) -> None:
        self._shifts[0] += wall
        self._shifts[1] += monotonic

    def apply_to_this_process(self) -> None:
        """Give this process these clocks."""
        preloaded = importlib.import_module("preloaded")
        preloaded.apply_clock_shift(self._shifts)


@dataclass
class Command:
    """A command that runs, or ran.

    Attributes:
        wait: waits so many seconds for the end, and gives the exit code or None. Only one thread may wait.
        gate: where a watched one asks before its file operations, see ``fork_command``.
    """

    pid: int
    wait: Callable[[float], int | None]
    log: Path
    clocks: Clocks = field(default_factory=Clocks)
    gate: Connection | None = None

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def exists(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.wait(0) is None:
            self.signal(signal.SIGKILL)
            self.wait(END_TIMEOUT_S)

    def end(self, timeout_s: float = END_TIMEOUT_S) -> int:
        """Wait for the end; gives the exit code. Kills and raises ``TimeoutError`` where it never comes."""
        code = self.wait(timeout_s)
        if code is None:
            self.kill()
            raise TimeoutError(f"did not end in {timeout_s:g} s: {self.last_line()}")
        return code

    def fill_disk(self, limit: int) -> None:
        """No file of this process may grow beyond so many bytes: what a disk that is full does to a write."""
        with suppress(ProcessLookupError):
            _, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (limit, hard))

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return lines[-1][:300] if lines else "(said nothing)"


Start = Callable[..., Command]
"""Start ``dlora-edge`` (package "edge") or ``dlora-cloud`` ("cloud"); what it says is added to a log."""


def fork_command(
    package: str, arguments: Sequence[object], log: Path, *, watch: Path | None = None, **environment: str
) -> Command:
    """Start a command in milliseconds; see ``Start``.

    ``watch`` is a directory: before it opens for writing, renames or removes a file in there, the process sends the
    operation through ``gate`` and waits for an answer. ``b"full"`` fails it, as a full disk does.
    """
    _start_fork_server()
    clocks = Clocks()
    ours, theirs = _context.Pipe() if watch else (None, None)
    process = _context.Process(
        target=_run,
        args=(package, [str(each) for each in arguments], str(log), clocks, theirs, str(watch), environment),
        daemon=True,
    )
    with _starting:
        process.start()
    if theirs is not None:
        theirs.close()

    def wait(timeout_s: float) -> int | None:
        multiprocessing.connection.wait([process.sentinel], timeout_s)
        with _starting:
            return process.exitcode

    assert process.pid is not None
    return Command(process.pid, wait, log, clocks, ours)


def spawn_command(
    package: str, arguments: Sequence[object], log: Path, *, watch: Path | None = None, **environment: str
) -> Command:
    """Start a command as a shell does; see ``Start``. Its file operations cannot be watched."""
    executable = Path(sys.executable).parent / f"dlora-{package}"
    environment = {**quiet_environment(), **environment}
    with log.open("a") as output:
        process = subprocess.Popen([executable, *map(str, arguments)], stdout=output, stderr=output, env=environment)

    def wait(timeout_s: float) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout_s)
        return None

    return Command(process.pid, wait, log)


def _start_fork_server() -> None:
    """It finds ``preloaded`` on its path only; and idle OpenMP threads must not spin where processes share cores."""
    with _starting:
        before = dict(os.environ)
        os.environ.update(quiet_environment(), PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)


def wait_until_it_listens(server: Command, port: int) -> None:
    """Raises ``RuntimeError`` where it ends instead."""
    while server.wait(0) is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.005)
        else:
            return
    raise RuntimeError(f"the server did not start: {server.last_line()}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _run(
    package: str, arguments: list[str], log: str, clocks: Clocks, gate: Connection | None, watched: str,
    environment: dict[str, str],
) -> None:  # fmt: skip
    os.environ.update({**quiet_environment(), **environment})
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    clocks.apply_to_this_process()
    if gate is not None:
        _watch(gate, watched)
    sys.argv = [f"dlora-{package}", *arguments]
    importlib.import_module(f"dlora.{package}.__main__").main()


def _watch(gate: Connection, watched: str) -> None:
    """Ask before each operation on a file in there. Python tells hooks of them, and there is no way to unhook."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and mode[0] in "wax") or (isinstance(flags, int) and flags & os.O_ACCMODE)
        elif event in ("os.rename", "os.remove"):
            path, writes = arguments[0], True
        else:
            return
        name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        if writes and name.startswith(watched + os.sep):
            try:
                gate.send_bytes(f"{event} {os.path.relpath(name, watched)}".encode())
                answer = gate.recv_bytes()
            except (EOFError, OSError):
                return
            if answer == b"full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(hook)
