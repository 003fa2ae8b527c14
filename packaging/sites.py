"""dlora and its pinned dependencies in folders under build/, for each architecture, unpacked by this machine's pip.

For aarch64 too: pip takes the wheels of another platform, natively and with this machine's settings for its registry.
The arm root needs no network and no pip.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGING, WORK = ROOT / "packaging", ROOT / "build" / "edge" / "work"
ARM_ROOT = [str(PACKAGING / "debian_root.sh"), "arm"]
ARCHITECTURES = ("x86_64", "aarch64")
TOOLS = WORK / "tools"
# A wheel says the oldest glibc that it runs on; the arm root has 2.36.
ARM_PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1)] + ["manylinux2014_aarch64", "any"]


def install(arch: str) -> list[Path]:
    """What ``PYTHONPATH`` must name: dlora, made anew, and its dependencies, kept while the pins are the same."""
    if not (TOOLS / "made").exists():
        say("an environment with pip")
        venv.create(TOOLS, with_pip=True, clear=True)
        run([*pip(), "install", "--upgrade", "pip>=25.1"])
        (TOOLS / "made").touch()
    return [_dlora(arch), _pinned(arch, "site", "requirements.txt", "requirements-build.txt")]


def arm_environment() -> Path:
    """The plain package and pytest, as a virtual environment for the arm root; by hand, as it cannot run here."""
    sites = [*install("aarch64"), _pinned("aarch64", "site-tests", "requirements-tests.txt")]
    environment = WORK / "aarch64" / "environment"
    packages = environment / "lib" / "python3.11" / "site-packages"
    shutil.rmtree(environment, ignore_errors=True)
    packages.mkdir(parents=True)
    (packages / "sites.pth").write_text("".join(f"{site}\n" for site in sites))
    (environment / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    (environment / "bin").mkdir()
    (environment / "bin" / "python").symlink_to("/usr/bin/python3")
    return environment


def _pinned(arch: str, name: str, *lists: str) -> Path:
    site, stamp = WORK / arch / name, WORK / arch / f"{name}.made"
    paths = [PACKAGING / name for name in lists]
    wanted = sys.version + "".join(path.read_text() for path in paths)
    if not stamp.exists() or stamp.read_text() != wanted:
        say(f"pinned packages for {arch}: {', '.join(lists)}")
        stamp.unlink(missing_ok=True)
        shutil.rmtree(site, ignore_errors=True)
        run([*_into(arch, site), *(f"--requirement={path}" for path in paths)])
        stamp.write_text(wanted)
    return site


def _dlora(arch: str) -> Path:
    say("dlora's wheel")
    site, wheels = WORK / arch / "site-dlora", WORK / "dist"
    # setuptools leaves modules in build/lib, and would take along those that no longer exist.
    for folder in (ROOT / "build" / "lib", site, wheels):
        shutil.rmtree(folder, ignore_errors=True)
    run([*pip(), "wheel", "--no-deps", "--wheel-dir", wheels, ROOT])
    run([*_into(arch, site), *wheels.glob("dlora-*.whl")])
    return site


def _into(arch: str, site: Path) -> list[object]:
    site.mkdir(parents=True)
    command = [*pip(), "install", "--target", site, "--no-deps", "--no-compile"]
    if arch != platform.machine():
        command += ["--only-binary=:all:", "--implementation=cp", "--python-version=3.11"]
        command += [f"--platform={name}" for name in ARM_PLATFORMS]
    return command


def pip() -> list[object]:
    return [TOOLS / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]


def inside(arch: str) -> list[str]:
    """What a command for ``arch`` begins with."""
    return [*ARM_ROOT, "run"] if arch == "aarch64" else []


def run(command: Sequence[object]) -> None:
    """Run a command; where it fails, so do we, in a line."""
    done = subprocess.run([str(part) for part in command], env={**os.environ, "PYTHONNOUSERSITE": "1"}, check=False)
    if done.returncode:
        fail(f"{' '.join(map(str, command[:6]))} … ended with {done.returncode}")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def fail(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    run([*ARM_ROOT, "make"])
    print(arm_environment())
