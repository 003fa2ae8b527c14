"""``packaging/install.sh``: into a scratch root and out again, without root, and never over anybody's data."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from processes import Finished

PACKAGING = Path(__file__).parents[1] / "packaging"
BINARY = PACKAGING.parent / "build" / "edge" / os.uname().machine / "dlora-edge"
STAND_IN = '#!/bin/sh\n[ "$1" = --version ] && echo "dlora-edge 0.1.0"\nexit 0\n'


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """The real one where it was built; else a script that answers as it does."""
    return BINARY if BINARY.exists() else executable(tmp_path / "given" / "dlora-edge", STAND_IN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return executable(tmp_path / "dlora-edge-dir" / "dlora-edge", STAND_IN).parent


def script(*arguments: object, at: Path = PACKAGING / "install.sh", path: str = "") -> Finished:
    environment = {**os.environ, "PATH": f"{path}{os.environ['PATH']}"}
    command = ["sh", str(at), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    return Finished(done.returncode, done.stdout, done.stderr)


def installed(*arguments: object) -> str:
    """What the script says when it is done."""
    done = script(*arguments)
    assert done.code == 0, done.stderr
    return done.stdout


def one_line(done: Finished, code: int, said: str) -> None:
    assert done.code == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_install_run_uninstall(binary: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    installed("--root", root, "--binary", binary)
    program = root / "usr/local/bin/dlora-edge"
    assert subprocess.run([program, "--version"], check=True, capture_output=True).stdout == b"dlora-edge 0.1.0\n"
    unit = (root / "etc/systemd/system/dlora-edge.service").read_text()
    assert "ExecStart=/usr/local/bin/dlora-edge train" in unit
    assert (root / "usr/lib/sysusers.d/dlora-edge.conf").read_text().startswith("u dlora-edge ")
    settings = root / "etc/dlora-edge/train.conf"
    assert stat.S_IMODE(settings.stat().st_mode) == 0o600  # a token may stand in it

    settings.write_text("DLORA_ARGS=mine\n")
    adapter = root / "var/lib/dlora-edge/adapter/adapter_model.safetensors"
    adapter.parent.mkdir()
    adapter.write_bytes(b"weights")
    installed("--root", root, "--binary", binary)  # an update
    assert str(root / "var/lib/dlora-edge") in installed("--root", root, "--uninstall")
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() or path.is_symlink())
    assert left == ["etc/dlora-edge/train.conf", "var/lib/dlora-edge/adapter/adapter_model.safetensors"]
    assert (settings.read_text(), adapter.read_bytes()) == ("DLORA_ARGS=mine\n", b"weights")
    one_line(script("--root", root, "--uninstall"), 1, "is not installed")


def test_folder_installs_and_runs(folder: Path, binary: Path, tmp_path: Path) -> None:
    root, there = tmp_path / "root", ("--root", tmp_path / "root", "--prefix", "/opt/dlora")
    installed(*there, "--binary", folder, "--user", "trainer")
    program = root / "opt/dlora/bin/dlora-edge"
    assert program.resolve() == root / "opt/dlora/lib/dlora-edge/dlora-edge"
    subprocess.run([program, "--version"], check=True)
    unit = (root / "etc/systemd/system/dlora-edge.service").read_text()
    assert "ExecStart=/opt/dlora/bin/dlora-edge train" in unit
    assert "\nUser=trainer\n" in unit
    # The single file in the place of the folder, and away with it.
    installed(*there, "--binary", binary)
    assert not program.is_symlink()
    assert not (root / "opt/dlora/lib/dlora-edge").exists()
    installed(*there, "--uninstall")
    assert not program.exists()


@pytest.mark.parametrize(
    ("machine", "bits", "said"),
    [
        ("armv7l", 32, "this machine is armv7l; dlora-edge needs 64-bit"),
        ("riscv64", 64, "this machine is riscv64"),
        ("aarch64", 32, "the system is 32-bit (getconf LONG_BIT)"),  # Raspberry Pi OS of 32 bits on its 64-bit kernel
    ],
)
def test_unsupported_machine_is_refused(machine: str, bits: int, said: str, folder: Path, tmp_path: Path) -> None:
    """By what ``uname`` and ``getconf`` say there."""
    for program, answer in (("uname", machine), ("getconf", bits)):
        executable(tmp_path / "fakes" / program, f"#!/bin/sh\necho {answer}\n")
    root = tmp_path / "root"
    one_line(script("--root", root, "--binary", folder, path=f"{tmp_path / 'fakes'}:"), 12, said)
    assert not root.exists()


def test_binary_of_another_architecture_is_refused(tmp_path: Path) -> None:
    root, other = tmp_path / "root", executable(tmp_path / "dlora-edge", "")
    other.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xf3\x00" + bytes(100))  # riscv
    one_line(script("--root", root, "--binary", other), 12, "does not run on this")
    assert not root.exists()
    installed("--root", root, "--binary", other, "--no-verify")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--bogus"], 2, "unknown option"),
        (["--root"], 2, "needs a value"),
        (["--prefix", "relative"], 2, "must begin with /"),
        (["--prefix", "/a|b"], 2, "letters"),
        (["--user", "Root;x"], 2, "--user"),
        (["--binary", "/nonexistent", "--root", "/nonexistent"], 1, "make edge-binary"),
        (["--binary", "/bin/true", "--root", "/nonexistent"], 1, "something else than dlora-edge"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], code: int, said: str) -> None:
    one_line(script(*arguments), code, said)
    assert "--uninstall" in installed("--help")


def test_systemd_accepts_the_unit(folder: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    root = tmp_path / "root"
    installed("--root", root, "--binary", folder)
    for target in ("sysinit", "basic", "shutdown", "network-online"):
        (root / f"etc/systemd/system/{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    command = ["systemd-analyze", "verify", f"--root={root}", "--man=no", "dlora-edge.service"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "dlora-edge" in line] == []
    assert done.returncode == 0, done.stderr
    # And it does find what is wrong.
    unit = root / "etc/systemd/system/dlora-edge.service"
    unit.write_text(unit.read_text().replace("StateDirectoryMode", "StateDirectoryMood"))
    assert "StateDirectoryMood" in subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_a_relative_binary_is_the_one_that_was_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "elsewhere" / "prog", STAND_IN)
    executable(tmp_path / "here" / "prog", "#!/bin/sh\necho rubbish\n")
    monkeypatch.chdir(tmp_path / "here")
    done = script("--root", tmp_path / "root", "--binary", "prog", path=f"{tmp_path / 'elsewhere'}:")
    one_line(done, 1, "something else than dlora-edge")


def test_install_of_the_script_alone_keeps_the_unit(tmp_path: Path) -> None:
    root, binary = tmp_path / "root", executable(tmp_path / "given" / "dlora-edge", STAND_IN)
    installed("--root", root, "--binary", binary)
    unit = root / "etc/systemd/system/dlora-edge.service"
    before = unit.read_bytes()
    alone = executable(tmp_path / "alone" / "install.sh", (PACKAGING / "install.sh").read_text())
    one_line(script("--root", root, "--binary", binary, at=alone), 1, "there is no dlora-edge.service beside")
    assert unit.read_bytes() == before
