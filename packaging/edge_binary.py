"""Builds ``dlora-edge`` as one file and as a folder that need no Python: ``make edge-binary ARCH=x86_64|aarch64``.

aarch64 is built inside the emulated bookworm root of ``arm_root.sh``; wheels for it are chosen and unpacked by this machine's pip,
which is quicker and is set up for its registry. Everything lies under build/; only the standard library is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGING, WORK = ROOT / "packaging", ROOT / "build" / "edge" / "work"
ARM_ROOT = PACKAGING / "arm_root.sh"
# Wheels say the oldest glibc that they run on; the arm root has 2.36.
ARM_PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1)] + ["manylinux2014_aarch64"]
SHIM_LIBRARY = "libdlora_executorch.so"
STARTS = 7


def main() -> None:
    """Build one architecture and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=["x86_64", "aarch64"], default=platform.machine())
    parser.add_argument("--with-executorch", action="store_true", help="put build/shim/ARCH into it")
    options = parser.parse_args()
    if options.arch == "x86_64" and platform.machine() != "x86_64":
        fail("x86_64 is built on x86_64 only")
    started = time.monotonic()
    if options.arch == "aarch64":
        run([ARM_ROOT, "make"])
    shim = find_shim(options.arch) if options.with_executorch else None
    site = install(options.arch)
    freeze(options.arch, site, shim)
    made = report(options.arch, shim)
    say(f"built in {time.monotonic() - started:.0f} s")
    print(json.dumps(made, indent=1))


def find_shim(arch: str) -> Path:
    """The shim and the ExecuTorch libraries that it needs, as ``make shim`` leaves them."""
    folder = ROOT / "build" / "shim" / arch
    if not (folder / SHIM_LIBRARY).exists():
        fail(f"there is no {folder.relative_to(ROOT)}/{SHIM_LIBRARY}; build it: make shim ARCH={arch}")
    return folder


def install(arch: str) -> Path:
    """dlora and its pinned dependencies for ``arch``, in a folder of their own; those of last time where they are the same."""
    tools = WORK / "tools"
    pip = [tools / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not (tools / "made").exists():
        say("an environment with pip")
        venv.create(tools, with_pip=True, clear=True)
        run([*pip, "install", "--upgrade", "pip>=25.1"])
        (tools / "made").touch()
    lists = [PACKAGING / "requirements.txt", PACKAGING / "requirements-build.txt"]
    site, stamp = WORK / arch / "site", WORK / arch / "site.made"
    wanted = sys.version + "".join(path.read_text() for path in lists)
    target = [*pip, "install", "--target", site, "--no-deps", "--no-compile"]
    if arch != platform.machine():
        target += ["--only-binary=:all:", "--implementation=cp", "--python-version=3.11"]
        target += [f"--platform={name}" for name in ARM_PLATFORMS] + ["--platform=any"]
    if not stamp.exists() or stamp.read_text() != wanted:
        say(f"pinned packages for {arch}")
        shutil.rmtree(WORK / arch, ignore_errors=True)
        site.mkdir(parents=True)
        run([*target, *(f"--requirement={path}" for path in lists)])
        stamp.write_text(wanted)
    say("dlora's wheel")
    # setuptools leaves modules in build/lib, and would take along those that no longer exist.
    for folder in (ROOT / "build" / "lib", WORK / "dist"):
        shutil.rmtree(folder, ignore_errors=True)
    run([*pip, "wheel", "--no-deps", "--wheel-dir", WORK / "dist", ROOT])
    run([*target, "--upgrade", *(WORK / "dist").glob("dlora-*.whl")])
    return site


def freeze(arch: str, site: Path, shim: Path | None) -> None:
    """Run PyInstaller, in the arm root for aarch64, and put its files where they belong."""
    say(f"PyInstaller for {arch}" + (", emulated: some minutes" if emulated(arch) else ""))
    work, out = WORK / arch, ROOT / "build" / "edge" / arch
    settings = {
        "PYTHONPATH": str(site),
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # The same input gives the same file: no clock, no hash seed.
        "PYTHONHASHSEED": "0",
        "SOURCE_DATE_EPOCH": "1700000000",
        "PYINSTALLER_CONFIG_DIR": str(work / "cache"),
        **({"DLORA_SHIM": str(shim)} if shim else {}),
    }
    command = ["-m", "PyInstaller", "--noconfirm", "--log-level=WARN", "--clean"]
    command += ["--distpath", work / "dist", "--workpath", work / "work", PACKAGING / "dlora-edge.spec"]
    in_root = ["env", *(f"{name}={value}" for name, value in settings.items())]
    python = "python3" if arch != platform.machine() else str(WORK / "tools" / "bin" / "python")
    with (work / "log").open("w") as log:
        done = subprocess.run([*inside(arch), *in_root, python, *map(str, command)], stdout=log, stderr=log, check=False)
    if done.returncode:
        sys.stderr.write((work / "log").read_text()[-3000:])
        fail(f"PyInstaller ended with {done.returncode}; all it said is in {work / 'log'}")
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(work / "dist", out)


def report(arch: str, shim: Path | None) -> dict[str, object]:
    """Sizes, glibc floor, start-up; also in build/edge/ARCH/report.json."""
    out = ROOT / "build" / "edge" / arch
    onefile, onedir = out / "dlora-edge", out / "dlora-edge-dir" / "dlora-edge"
    floor = max(filter(None, map(glibc_needed, elf_files(onedir.parent))), default=(0, 0))
    found = {
        "arch": arch,
        "executorch": shim is not None,
        "onefile_mb": round(onefile.stat().st_size / 1e6, 1),
        "onedir_mb": round(sum(p.stat().st_size for p in onedir.parent.rglob("*") if p.is_file()) / 1e6, 1),
        "glibc_floor": ".".join(map(str, floor)),
        "emulated": emulated(arch),
        "onefile_start_s": start_s(arch, onefile),
        "onedir_start_s": start_s(arch, onedir),
    }
    (out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def elf_files(folder: Path) -> list[Path]:
    """Every program and library beneath ``folder``."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return [path for path in files if path.open("rb").read(4) == b"\x7fELF"]


def glibc_needed(path: Path) -> tuple[int, int] | None:
    """The newest ``GLIBC_x.y`` that a file asks for."""
    said = subprocess.run(["readelf", "--version-info", "--wide", path], capture_output=True, text=True, check=True)
    versions = [(int(major), int(minor)) for major, minor in re.findall(r"GLIBC_(\d+)\.(\d+)", said.stdout)]
    return max(versions, default=None)


def start_s(arch: str, program: Path) -> float:
    """Median seconds of ``--version``, entering the arm root not counted: a start there is timed by its own shell."""
    code = (
        "import subprocess, sys, time, json\ntimes = []\n"
        f"for _ in range({STARTS}):\n"
        "    started = time.perf_counter()\n"
        "    subprocess.run([sys.argv[1], '--version'], check=True, stdout=subprocess.DEVNULL)\n"
        "    times.append(time.perf_counter() - started)\n"
        "print(json.dumps(times))"
    )
    done = subprocess.run([*inside(arch), "python3", "-c", code, program], capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"{program} does not start: {done.stderr.strip()[-500:]}")
    return round(statistics.median(json.loads(done.stdout)), 2)


def emulated(arch: str) -> bool:
    return arch != platform.machine()


def inside(arch: str) -> list[str]:
    """What a command for ``arch`` begins with."""
    return [str(ARM_ROOT), "run"] if arch == "aarch64" else []


def run(command: Sequence[object]) -> None:
    done = subprocess.run([str(part) for part in command], env={**os.environ, "PYTHONNOUSERSITE": "1"}, check=False)
    if done.returncode:
        fail(f"{' '.join(map(str, command[:6]))} … ended with {done.returncode}")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def fail(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
