"""Builds ``dlora-edge`` as one file and as a folder that need no Python: ``make edge-binary ARCH=x86_64|aarch64``.

aarch64 is built inside the emulated bookworm root of ``debian_root.sh``. Everything lies under build/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from sites import ARCHITECTURES, ARM_ROOT, PACKAGING, ROOT, TOOLS, WORK, fail, inside, install, run, say

SHIM_LIBRARY = "libdlora_executorch.so"
STARTS = 7


def main() -> None:
    """Build one architecture and print what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", choices=ARCHITECTURES, default=platform.machine())
    parser.add_argument("--with-executorch", action="store_true", help="put build/shim/ARCH into it")
    options = parser.parse_args()
    if options.arch == "x86_64" and platform.machine() != "x86_64":
        fail("x86_64 is built on x86_64 only")
    started = time.monotonic()
    if options.arch == "aarch64":
        run([*ARM_ROOT, "make"])
    shim = find_shim(options.arch) if options.with_executorch else None
    kept = ROOT / "build" / "edge" / options.arch / "report.json"
    digest = inputs_digest(shim)
    if not kept.exists() or json.loads(kept.read_text()).get("inputs") != digest:
        kept.unlink(missing_ok=True)
        freeze(options.arch, install(options.arch), shim)
        kept.write_text(json.dumps(report(options.arch, shim) | {"inputs": digest}, indent=1) + "\n")
        say(f"built in {time.monotonic() - started:.0f} s")
    else:
        say("nothing has changed since it was built")
    print(kept.read_text(), end="")


def inputs_digest(shim: Path | None) -> str:
    """Of what goes into a binary, and of the interpreter that builds it; not of the scripts."""
    folders = [ROOT / "edge", ROOT / "protocol", *([shim] if shim else [])]
    found = (path for folder in folders for path in folder.rglob("*"))
    paths = sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)
    names = ("dlora-edge.spec", "entry.py", "requirements.txt", "requirements-build.txt")
    digest = hashlib.sha256(sys.version.encode())
    for path in [ROOT / "pyproject.toml", *(PACKAGING / name for name in names), *paths]:
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def find_shim(arch: str) -> Path:
    """The shim and the ExecuTorch libraries that it needs, as ``make shim`` leaves them."""
    folder = ROOT / "build" / "shim" / arch
    if not (folder / SHIM_LIBRARY).exists():
        fail(f"there is no {folder.relative_to(ROOT)}/{SHIM_LIBRARY}; build it: make shim ARCH={arch}")
    return folder


def freeze(arch: str, sites: list[Path], shim: Path | None) -> None:
    """Run PyInstaller, in the arm root for aarch64, and put its files where they belong."""
    say(f"PyInstaller for {arch}" + (", emulated: some minutes" if emulated(arch) else ""))
    work, out = WORK / arch, ROOT / "build" / "edge" / arch
    settings = {
        "PYTHONPATH": ":".join(map(str, sites)),
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # The same input gives the same file: no clock, no hash seed.
        "PYTHONHASHSEED": "0",
        "SOURCE_DATE_EPOCH": "1700000000",
        "PYINSTALLER_CONFIG_DIR": str(work / "cache"),
        **({"DLORA_SHIM": str(shim)} if shim else {}),
    }
    command: list[object] = ["-m", "PyInstaller", "--noconfirm", "--log-level=WARN", "--clean"]
    command += ["--distpath", work / "dist", "--workpath", work / "work", PACKAGING / "dlora-edge.spec"]
    in_root = ["env", *(f"{name}={value}" for name, value in settings.items())]
    python = "python3" if arch != platform.machine() else str(TOOLS / "bin" / "python")
    with (work / "log").open("w") as log:
        done = subprocess.run(
            [*inside(arch), *in_root, python, *map(str, command)], stdout=log, stderr=log, check=False
        )
    if done.returncode:
        sys.stderr.write((work / "log").read_text()[-3000:])
        fail(f"PyInstaller ended with {done.returncode}; all it said is in {work / 'log'}")
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(work / "dist", out)


def report(arch: str, shim: Path | None) -> dict[str, object]:
    """Sizes, glibc floor, start-up."""
    out = ROOT / "build" / "edge" / arch
    onefile, onedir = out / "dlora-edge", out / "dlora-edge-dir" / "dlora-edge"
    floor = max(filter(None, map(glibc_needed, elf_files(onedir.parent))), default=(0, 0))
    return {
        "arch": arch,
        "executorch": shim is not None,
        "onefile_mb": round(onefile.stat().st_size / 1e6, 1),
        "onedir_mb": round(sum(p.stat().st_size for p in onedir.parent.rglob("*") if p.is_file()) / 1e6, 1),
        "glibc_floor": ".".join(map(str, floor)),
        "emulated": emulated(arch),
        "onefile_start": starts(arch, onefile),
        "onedir_start": starts(arch, onedir),
    }


def elf_files(folder: Path) -> list[Path]:
    """Every program and library beneath ``folder``."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return [path for path in files if path.open("rb").read(4) == b"\x7fELF"]


def glibc_needed(path: Path) -> tuple[int, int] | None:
    """The newest ``GLIBC_x.y`` that a file asks for."""
    said = subprocess.run(["readelf", "--version-info", "--wide", path], capture_output=True, text=True, check=True)
    versions = [(int(major), int(minor)) for major, minor in re.findall(r"GLIBC_(\d+)\.(\d+)", said.stdout)]
    return max(versions, default=None)


def starts(arch: str, program: Path) -> dict[str, float]:
    """What ``--version`` takes: median seconds, and of the processor, which is the same on a busy machine.

    Entering the arm root is not counted, as a Python in there takes the times.
    """
    code = (
        "import json, os, subprocess, sys, time\nwall, cpu = [], []\n"
        f"for _ in range({STARTS}):\n"
        "    began, before = time.perf_counter(), os.times()\n"
        "    subprocess.run([sys.argv[1], '--version'], check=True, stdout=subprocess.DEVNULL)\n"
        "    after = os.times()\n"
        "    wall.append(time.perf_counter() - began)\n"
        "    cpu.append(sum(after[2:4]) - sum(before[2:4]))\n"
        "print(json.dumps([wall, cpu]))"
    )
    done = subprocess.run([*inside(arch), "python3", "-c", code, program], capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"{program} does not start: {done.stderr.strip()[-500:]}")
    wall, cpu = json.loads(done.stdout)
    return {"s": round(statistics.median(wall), 2), "cpu_s": round(statistics.median(cpu), 2)}


def emulated(arch: str) -> bool:
    return arch != platform.machine()


if __name__ == "__main__":
    main()
