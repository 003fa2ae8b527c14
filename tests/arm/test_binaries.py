"""What ``make edge-binary`` made: how large, the oldest system that it runs on, how quickly it starts."""

from __future__ import annotations

import json

import pytest
from arm_root import BINARIES

pytestmark = pytest.mark.arm
ONEFILE_MB = {False: 45, True: 60}  # without and with ExecuTorch
ONEDIR_START_S, ONEFILE_START_S = 0.5, 1.5


def report(arch: str) -> dict[str, object]:
    path = BINARIES / arch / "report.json"
    assert path.exists(), f"no binary for {arch}; run: make test-arm"
    found: dict[str, object] = json.loads(path.read_text())
    return found


def test_the_arm_binary_is_small_and_runs_on_debian_12() -> None:
    found = report("aarch64")
    assert found["onefile_mb"] <= ONEFILE_MB[bool(found["executorch"])]  # type: ignore[operator]
    assert tuple(map(int, str(found["glibc_floor"]).split("."))) <= (2, 36)


@pytest.mark.slow
def test_it_starts_quickly_on_this_machine() -> None:
    found = report("x86_64")
    assert found["onedir_start_s"] <= ONEDIR_START_S  # type: ignore[operator]
    assert found["onefile_start_s"] <= ONEFILE_START_S  # type: ignore[operator]
