"""Commands for aarch64, emulated: the frozen binary, and the plain package in the arm root."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from processes import Finished, run_edge

if TYPE_CHECKING:
    from arm_place import Place

ROOT = Path(__file__).parents[2]
ARM_ROOT = [str(ROOT / "packaging" / "debian_root.sh"), "arm"]
BINARIES = ROOT / "build" / "edge"
PACKAGE = ROOT / "build" / "edge" / "work" / "aarch64" / "environment" / "bin" / "python"
SHIM = ROOT / "build" / "shim" / "aarch64"
TIMEOUT_S = 1800


@dataclass(frozen=True)
class Device:
    """One way to run ``dlora-edge`` on aarch64. Paths are the same inside and here, where ``directory`` holds them."""

    command: tuple[str, ...]
    directory: Path

    def __call__(self, *arguments: object) -> Finished:
        return run([*self.command, *arguments], self.directory)


FROZEN = str(BINARIES / "aarch64" / "dlora-edge-dir" / "dlora-edge")
ONEFILE = str(BINARIES / "aarch64" / "dlora-edge")
COMMANDS = {"binary": (FROZEN,), "onefile": (ONEFILE,), "package": (str(PACKAGE), "-m", "dlora.edge")}


def entered(command: list[object], directory: Path) -> list[str]:
    """``command`` inside the root, which sees ``directory`` where it is here; so does the device's own state."""
    assert Path(FROZEN).exists(), "no aarch64 binary; run: make test-arm"
    state = f"DLORA_EDGE_STATE={directory / 'device-state'}"
    settings = ["env", state, "OMP_WAIT_POLICY=PASSIVE", "PYTHONDONTWRITEBYTECODE=1", "DLORA_TOKEN="]
    return [*ARM_ROOT, "run", "--bind", str(directory), *settings, *map(str, command)]


def run(command: list[object], directory: Path) -> Finished:
    """Run to the end."""
    done = subprocess.run(entered(command, directory), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    return Finished(done.returncode, done.stdout, done.stderr)


def wait_until(true: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def losses(out: Path) -> list[float]:
    """Of each step of a run."""
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_through_blocks(place: Place, bundle: Path, engine: str, here: Path) -> None:
    """Three steps through blocks on the device, and an answer with them, in the root and here.

    Losses to 1e-4, as those of other runs: each step takes sums in another order.
    """
    device = Device(("env", f"DLORA_EXECUTORCH_DIR={SHIM}", *COMMANDS["package"]), place.directory)
    answers = []
    for run_there, out in ((device, place.directory / f"blocks-{engine}"), (run_edge, here)):
        common = ["--bundle", bundle, "--engine", engine, "--threads", 1, "--json"]
        blocks = ["--data", place.directory / "data.jsonl", "--out", out, "--device-blocks", "all", "--seed", 0]
        well(run_there("train", *blocks, "--steps", 3, "--batch-size", 2, "--lr", 1e-2, *common))
        asked = ["--adapter", out, "--prompt", "w5 w6", "--max-new-tokens", 8]
        answers.append(json.loads(well(run_there("generate", *asked, *common)))["answer"])
    assert losses(place.directory / f"blocks-{engine}") == pytest.approx(losses(here), rel=1e-4)
    assert answers[0] == answers[1]


def well(done: Finished) -> str:
    assert done.code == 0, done.stderr
    return done.stdout
