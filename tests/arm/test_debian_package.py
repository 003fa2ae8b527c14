"""``make edge-deb``: dpkg installs, updates, removes and purges it in the arm root, and touches nobody's data."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from arm_place import Place
from arm_root import ROOT, run, well
from tools import find_tool

pytestmark = [pytest.mark.arm, pytest.mark.timeout(1800)]
INSIDE = ROOT / "build" / "arm" / "root"
SETTINGS, STATE = INSIDE / "etc/dlora-edge/train.conf", INSIDE / "var/lib/dlora-edge"


def package(out: Path, *options: str) -> Path:
    """Of the aarch64 folder, as ``make edge-deb`` makes it."""
    find_tool("dpkg-deb")
    command = [sys.executable, ROOT / "packaging" / "edge_deb.py", "--arch", "aarch64", "--out", out, *options]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


@dataclass(frozen=True)
class Dpkg:
    """The root's, with a list of packages that lies in ``directory``: the root's own are in no list."""

    directory: Path

    def __call__(self, *arguments: object) -> str:
        place = f"--admindir={self.directory / 'dpkg'}"
        done = run(["dpkg", place, "--force-depends", *arguments], self.directory)
        assert done.code == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def dpkg(tmp_path: Path) -> Iterator[Dpkg]:
    for name in ("info", "updates", "triggers"):
        (tmp_path / "dpkg" / name).mkdir(parents=True)
    (tmp_path / "dpkg" / "status").touch()
    made = Dpkg(tmp_path)
    try:
        yield made
    finally:
        made("--purge", "dlora-edge")
        run(["rm", "-rf", "/var/lib/dlora-edge"], tmp_path)


def test_the_package_installs_updates_and_leaves_what_is_not_its_own(dpkg: Dpkg, place: Place) -> None:
    first, second = package(dpkg.directory), package(dpkg.directory, "--version", "0.2.0~test")
    dpkg("--install", first)
    assert "dlora-edge 0.1.0" in well(run(["dlora-edge", "--version"], dpkg.directory))
    well(run(["dlora-edge", "selftest", "--bundle", place.bundle, "--threads", 1], place.directory))
    assert "dlora-edge:" in (INSIDE / "etc/passwd").read_text()
    assert stat.S_IMODE(SETTINGS.stat().st_mode) == 0o600  # a token may stand in it
    assert "ExecStart=/usr/bin/dlora-edge train" in (INSIDE / "usr/lib/systemd/system/dlora-edge.service").read_text()

    mine = {SETTINGS: "DLORA_ARGS=mine\n", STATE / "data.jsonl": "rows", STATE / "adapter/part": "weights"}
    for path, text in mine.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    dpkg("--install", second)
    assert "Version: 0.2.0~test" in dpkg("--status", "dlora-edge")
    well(run(["dlora-edge", "--version"], dpkg.directory))
    assert {path: path.read_text() for path in mine} == mine

    dpkg("--remove", "dlora-edge")
    assert not (INSIDE / "usr/bin/dlora-edge").is_symlink()
    assert not (INSIDE / "usr/lib/dlora-edge").exists()
    assert {path: path.read_text() for path in mine} == mine
    assert "still in /var/lib/dlora-edge" in dpkg("--purge", "dlora-edge")
    del mine[SETTINGS]
    assert not SETTINGS.exists()
    assert {path: path.read_text() for path in mine} == mine


def test_dpkg_is_told_what_the_program_needs(tmp_path: Path) -> None:
    made = package(tmp_path)
    said = subprocess.run([find_tool("dpkg-deb"), "--info", made], check=True, capture_output=True, text=True).stdout
    assert "Architecture: arm64" in said
    assert "libc6 (>= 2.36)" in said
    assert made.stat().st_size < 40e6
