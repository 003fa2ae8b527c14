"""Processes that benchmarks measure against: a real server, and PEFT training in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Idle OpenMP threads spin: with several processes on the same cores that decides what is measured.
QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


@contextmanager
def cloud_server(model: str, threads: int, *options: str) -> Iterator[tuple[str, int]]:
    """A ``dlora-cloud serve`` process; gives its address and process id."""
    command = [sys.executable, "-m", "dlora.cloud", "serve", model, "--port", "0", "--threads", str(threads), "--json"]
    with tempfile.TemporaryDirectory() as state:
        process = subprocess.Popen(
            [*command, "--state-dir", state, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **QUIET_THREADS},
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"error: the server did not start: dlora-cloud serve {model}")
            yield json.loads(line)["url"], process.pid
        finally:
            process.terminate()
            process.wait(20)


def run_json(*command: object) -> dict[str, Any]:
    """What a Python command prints as JSON; its own lines go on to stderr."""
    done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, command[:4]))} … failed; its error is above")
    return dict(json.loads(done.stdout))


class Worker:
    """A child that answers each JSON line with one."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **QUIET_THREADS},
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("error: the PEFT process died; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


def log(text: str) -> None:
    """A line for people; stdout is for JSON."""
    print(text, file=sys.stderr, flush=True)


def need_bundle(path: Path) -> Path:
    """The bundle, or one line that says how to make it."""
    if not (path / "manifest.json").exists():
        raise SystemExit(f"error: no bundle in {path}; make it: dlora-export smollm2-135m --out {path}")
    return path
