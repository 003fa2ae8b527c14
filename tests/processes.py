"""The real commands as real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
EDGE, CLOUD = str(BIN / "dlora-edge"), str(BIN / "dlora-cloud")
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


def run_edge(*arguments: object, timeout_s: float = END_TIMEOUT_S, **environment: str) -> Finished:
    """Run ``dlora-edge`` to its end."""
    done = subprocess.run(
        [EDGE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**quiet_environment(), **environment},
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def start_edge(*arguments: object) -> subprocess.Popen[str]:
    """Start ``dlora-edge``; ``finish`` waits for it."""
    return subprocess.Popen(
        [EDGE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=quiet_environment(),
    )


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
        process = subprocess.Popen(
            [CLOUD, "serve", str(model), "--port", "0", "--threads", "1", "--json",
             "--state-dir", str(directory / "state"), *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=directory / "work", env=environment,
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
