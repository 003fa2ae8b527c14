"""Commands for aarch64, emulated: the frozen binary, and the plain package in the arm root."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from processes import Finished

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


def losses(out: Path) -> list[float]:
    """Of each step of a run."""
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_steps(place: Place, bundle: Path, engine: str) -> None:
    """Three steps through the blocks of a bundle, in the root and here (``block_steps.py``): losses and what is learnt.

    To 1e-4 of the largest, as losses of whole runs: each step takes sums in another order.
    """
    script = [str(ROOT / "tests" / "arm" / "block_steps.py"), bundle, engine]
    done = run(["env", f"DLORA_EXECUTORCH_DIR={SHIM}", PACKAGE, *script], place.directory)
    assert done.code == 0, done.stderr
    here = subprocess.run([sys.executable, *map(str, script)], capture_output=True, text=True, check=True)
    found, wanted = json.loads(done.stdout), json.loads(here.stdout)
    assert found["machine"] == "aarch64"
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
    assert wanted["losses"][-1] < wanted["losses"][0]
    assert set(found["learnt"]) == set(wanted["learnt"])
    for name, values in wanted["learnt"].items():
        assert found["learnt"][name] == pytest.approx(values, abs=1e-4 * max(map(abs, values))), name
