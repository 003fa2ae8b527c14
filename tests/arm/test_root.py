"""The arm root is what it says, and nothing of it is left on this machine."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from arm_root import ARM_ROOT, ROOT, run, wait_until

pytestmark = pytest.mark.arm


def test_emulated_processor_is_a_cortex_a72(tmp_path: Path) -> None:
    said = run(["cat", "/proc/cpuinfo"], tmp_path).stdout
    assert "CPU implementer\t: 0x41" in said  # Arm
    assert "CPU part\t: 0xd08" in said  # Cortex-A72


def test_killed_emulated_root_leaves_nothing(tmp_path: Path) -> None:
    script = f"cd {tmp_path}; touch here; sleep 600; touch still"
    with subprocess.Popen([*ARM_ROOT, "run", "--bind", tmp_path, "sh", "-c", script]) as process:
        while not (tmp_path / "here").exists():
            assert process.poll() is None
        process.kill()
    assert str(ROOT / "build" / "arm") not in Path("/proc/mounts").read_text()
    assert not Path("/proc/sys/fs/binfmt_misc/aarch64").exists()
    # The kernel kills the namespace's processes, in its time.
    wait_until(lambda: not any(str(tmp_path) in line for line in command_lines()), 30)


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield path.read_text(errors="replace")
