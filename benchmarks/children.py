"""What benchmarks have in common: their options, a real server, and processes that answer in JSON.

Who imports this has quiet threads, and so have all processes that it starts: idle OpenMP threads spin, and with several
processes on the same cores that decides what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")


def new_parser(about: str | None, *, bundle: str = "build/smollm2", threads: int = 2) -> argparse.ArgumentParser:
    """With the options of nearly every benchmark; ``about``: its docstring."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--bundle", type=Path, default=Path(bundle))
    parser.add_argument("--threads", type=int, default=threads, help="of each process")
    parser.add_argument("--docs", type=Path, default=Path("docs/log"), help="where what is found is written")
    return parser


@contextmanager
def cloud_server(model: str, threads: int, *options: str) -> Iterator[str]:
    """A ``dlora-cloud serve`` process; gives its address."""
    with cloud_process(model, threads, *options) as (url, _):
        yield url


@contextmanager
def cloud_process(model: str, threads: int, *options: str) -> Iterator[tuple[str, int]]:
    """The same; gives its address and its process id."""
    command = [sys.executable, "-m", "dlora.cloud", "serve", model, "--port", "0", "--threads", str(threads), "--json"]
    with tempfile.TemporaryDirectory() as state:
        command += ["--state-dir", state, *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"error: the server did not start: dlora-cloud serve {model}")
            yield json.loads(line)["url"], process.pid
        finally:
            process.terminate()
            process.wait(20)


def cpu_seconds(process: int) -> float:
    """Of a process and all of its threads so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pss_mb(process: int) -> float:
    """Memory of a process, of what it shares with others its part, in MB of 10**6 bytes."""
    return float(psutil.Process(process).memory_full_info().pss) / 1e6


def run_json(*command: object) -> dict[str, Any]:
    """What a Python command prints as JSON; its own lines go on to stderr."""
    done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, command[:4]))} … failed; its error is above")
    return dict(json.loads(done.stdout))


@contextmanager
def worker(script: str, *arguments: object) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """A script beside this one, as a child that answers each JSON line with one; gives what asks it."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(request), file=stdin, flush=True)
        if line := stdout.readline():
            return dict(json.loads(line))
        raise SystemExit(f"error: {script} died; its error is above")

    try:
        yield ask
    finally:
        stdin.close()
        process.wait(20)


def log(text: str) -> None:
    """A line for people; stdout is for JSON."""
    print(text, file=sys.stderr, flush=True)


def write_texts(path: Path) -> None:
    """Twenty texts of 140 words, of this repository's licence, as data to train on."""
    words = (Path(__file__).parents[1] / "LICENSE").read_text().split()
    rows = [" ".join(words[start : start + 140]) for start in range(0, 1400, 70)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def need_bundle(path: Path) -> Path:
    """The bundle, or one line that says how to make it."""
    if not (path / "manifest.json").exists():
        raise SystemExit(f"error: no bundle in {path}; make it: dlora-export smollm2-135m --out {path}")
    return path
