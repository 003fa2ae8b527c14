"""Builds the shim: ``make shim [ARCH=aarch64]``. A directory of libraries, flat, that runs wherever it is put.

``build/shim/<ARCH>/`` then has ``libdlora_executorch.so``, the libraries of the executorch wheel that it needs, and
``VERSION.json``. Headers and libraries are the wheel's: the installed one for this machine, a downloaded one for
another. g++ is all it takes; for another machine its cross compiler (Debian: ``g++-aarch64-linux-gnu``).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent.parent
MACHINES: Final = ("x86_64", "aarch64")
# In the order of the linker. Operators and the XNNPACK backend register themselves when they are loaded.
LIBRARIES: Final = (
    "executorch", "executorch_kernels_optimized", "executorch_backend_xnnpack", "executorch_threadpool",
)  # fmt: skip
WANTED: Final = "executorch>=1.5,<2"


def main() -> int:
    """Build for ``--arch``; 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description="Build the ExecuTorch shim.")
    parser.add_argument("--arch", choices=MACHINES, default=platform.machine())
    parser.add_argument("--runner", action="store_true", help="build the native runner, which uses the shim")
    options = parser.parse_args()
    try:
        where = build_runner(options.arch) if options.runner else build(options.arch)
    except (OSError, _BuildError, subprocess.CalledProcessError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in where.iterdir())
    print(f"{where.relative_to(ROOT)}: {size / 1e6:.1f} MB")
    return 0


class _BuildError(Exception):
    """Something is missing; the text says what."""


def build(arch: str) -> Path:
    """Build ``build/shim/<arch>`` anew, whole or not at all."""
    prefix, compiler = _tools(arch)
    wheel = _downloaded(arch) if prefix else _installed()
    version = _wheel_version(wheel)
    out = ROOT / "build" / "shim" / arch
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as made_in:
        made = Path(made_in) / arch
        made.mkdir()
        for name in LIBRARIES:
            shutil.copy(wheel / "lib" / f"lib{name}.so", made)
        _compile(compiler, wheel, version, made)
        for path in made.iterdir():
            subprocess.run([f"{prefix}strip", "--strip-unneeded", path], check=True)
        written = {"executorch": version, "abi": _abi(), "arch": arch}
        (made / "VERSION.json").write_text(json.dumps(written) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)
    return out


def build_runner(arch: str) -> Path:
    """Build ``build/native/<arch>/dlora-native-runner``; it finds the shim beside it in ``build``."""
    _, compiler = _tools(arch)
    shim = ROOT / "build" / "shim" / arch
    if not (shim / "VERSION.json").exists():
        build(arch)
    out = ROOT / "build" / "native" / arch
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            compiler, "-O2", "-std=c++20", "-Wall", "-Wextra", "-I", HERE, HERE / "runner" / "runner.cpp",
            "-o", out / "dlora-native-runner", f"-L{shim}", "-ldlora_executorch", f"-Wl,-rpath-link,{shim}",
            f"-Wl,-rpath,$ORIGIN/../../shim/{arch}",
        ],
        check=True,
    )  # fmt: skip
    return out


def _tools(arch: str) -> tuple[str, str]:
    """The prefix of the tools for a machine, empty for this one, and its compiler."""
    prefix = "" if arch == platform.machine() else f"{arch}-linux-gnu-"
    compiler = shutil.which(f"{prefix}g++")
    if compiler is None:
        package = f"g++-{arch.replace('_', '-')}-linux-gnu" if prefix else "g++"
        raise _BuildError(f"there is no {prefix}g++; install one (Debian: apt install {package})")
    return prefix, compiler


def _compile(compiler: str, wheel: Path, version: str, made: Path) -> None:
    include = wheel / "include"
    portable = include / "executorch" / "runtime" / "core" / "portable_type" / "c10"
    subprocess.run(
        [
            compiler, "-O3", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
            "-DC10_USING_CUSTOM_GENERATED_MACROS", f'-DDLORA_EXECUTORCH_VERSION="{version}"',
            "-isystem", include, "-isystem", portable, *sorted(HERE.glob("*.cpp")),
            "-o", made / "libdlora_executorch.so", "-Wl,-soname,libdlora_executorch.so",
            f"-L{made}", "-Wl,--no-as-needed", *(f"-l{name}" for name in LIBRARIES), "-Wl,-rpath,$ORIGIN",
        ],
        check=True,
    )  # fmt: skip


def _installed() -> Path:
    spec = importlib.util.find_spec("executorch")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "lib" / "libexecutorch.so").exists():
            return Path(place)
    raise _BuildError(f"executorch is not installed for {sys.executable}; pip install '{WANTED}'")


def _downloaded(arch: str) -> Path:
    """Headers and libraries of the wheel for another machine, from the package index; of the installed version."""
    try:
        wanted = f"executorch=={_wheel_version(_installed())}"
    except _BuildError:
        wanted = WANTED
    wheels = ROOT / "build" / "shim" / "wheels"
    place = f"manylinux_2_28_{arch}"
    subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--only-binary=:all:", "--implementation", "cp", "--python-version", "311", "--abi", "cp311",
            "--platform", place, "--dest", wheels, wanted,
        ],
        check=True,
    )  # fmt: skip
    wheel = max(wheels.glob(f"executorch-*{arch}.whl"), key=lambda path: path.stat().st_mtime)
    unpacked = wheels / arch
    shutil.rmtree(unpacked, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name for name in archive.namelist() if re.match(r"executorch/(include/|lib/.*\.so$|version\.py$)", name)
        ]
        for name in names:
            archive.extract(name, unpacked)
    return unpacked / "executorch"


def _wheel_version(wheel: Path) -> str:
    found = re.search(r"__version__ = ['\"]([^'\"+]+)", (wheel / "version.py").read_text())
    if found is None:
        raise _BuildError(f"{wheel} does not say which version it is")
    return found[1]


def _abi() -> int:
    found = re.search(r"#define DLORA_ET_ABI (\d+)", (HERE / "dlora_executorch.h").read_text())
    assert found
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main())
