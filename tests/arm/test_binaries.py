"""What ``make edge-binary`` made: how large, the oldest system that it runs on, how quickly it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from arm_place import Place
from arm_root import BINARIES, losses, wait_until

from dlora.edge.training.checkpoint import list_checkpoints

pytestmark = pytest.mark.arm
ONEFILE_MB = {False: 45, True: 60}  # without and with ExecuTorch
ONEFILE = BINARIES / "x86_64" / "dlora-edge"
ONEDIR_START_S, ONEFILE_START_S = 0.5, 1.5


def report(arch: str) -> dict[str, Any]:
    path = BINARIES / arch / "report.json"
    assert path.exists(), f"no binary for {arch}; run: make test-arm"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_arm_binary_is_small_and_runs_on_debian_12() -> None:
    found = report("aarch64")
    assert found["onefile_mb"] <= ONEFILE_MB[bool(found["executorch"])]
    assert tuple(map(int, str(found["glibc_floor"]).split("."))) <= (2, 36)


@pytest.mark.slow
def test_binary_starts_within_time_limit() -> None:
    """Processor time: that of the clock is in the report too, and says more of what else is running."""
    found = report("x86_64")
    assert found["onedir_start"]["cpu_s"] <= ONEDIR_START_S
    assert found["onefile_start"]["cpu_s"] <= ONEFILE_START_S


@contextmanager
def training(place: Place, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The single file on a long run, in a group of its own as a shell would start it, three steps in."""
    command = [ONEFILE, *map(str, place.train(out, 10_000))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0)
    try:
        wait_until(lambda: (out / "metrics.jsonl").exists() and len(losses(out)) >= 3)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    "send",
    [lambda pid: os.killpg(pid, signal.SIGINT), lambda pid: os.kill(pid, signal.SIGTERM)],
    ids=["ctrl-c", "term"],
)
def test_one_signal_stops_training_after_the_step(place: Place, tmp_path: Path, send: Callable[[int], None]) -> None:
    """The single file is two processes: Ctrl-C goes to both, and twice would mean at once, without saving."""
    with training(place, tmp_path) as process:
        send(process.pid)
        assert process.wait(60) == 130
    (newest, _), *_ = list_checkpoints(tmp_path / "checkpoints")
    assert newest == len(losses(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_killed_binary_leaves_no_process(place: Place, tmp_path: Path) -> None:
    with training(place, tmp_path) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        process.kill()
        process.wait()
        wait_until(lambda: not Path(f"/proc/{children[0]}/exe").exists())
