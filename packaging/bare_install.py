"""Runs make's targets where there is no compiler, cmake or git: a bare Debian root, with a copy of this repository.

    python3 packaging/bare_install.py                     # .venv/.ready: all that the demo needs
    python3 packaging/bare_install.py .venv/.ready demo

Prints one JSON object; what the targets say goes to stderr. The copy and the root lie under build/bare/. pip has this
machine's settings there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BARE, COPY = ROOT / "build" / "bare", ROOT / "build" / "bare" / "dlora"
DEBIAN_ROOT = [str(ROOT / "packaging" / "debian_root.sh"), "bare"]
MISSING = ("gcc", "cc", "g++", "c++", "clang", "cmake", "git")
PIP_SETTINGS = ("etc/pip.conf", "etc/xdg/pip/pip.conf", "etc/xdg/pip/constraints.txt")


def main() -> None:
    """Print how it went; exit with make's code."""
    targets = sys.argv[1:] or [".venv/.ready"]
    run([*DEBIAN_ROOT, "make"]).check_returncode()
    take_pip_settings()
    copy_tracked_files()
    for program in MISSING:
        if run(inside("sh", "-c", f"command -v {program}")).returncode == 0:
            raise SystemExit(f"error: the root has {program}; remove {BARE / 'root'} and try again")
    seconds = {}
    for target in targets:
        started = time.monotonic()
        code = run(inside("make", target)).returncode
        seconds[target] = round(time.monotonic() - started)
        if code:
            raise SystemExit(f"error: make {target} ended with {code} in the bare root")
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), "missing": MISSING, "targets_s": seconds}))


def inside(*command: str) -> list[str]:
    """``command`` in the root, in the copy, with this machine's way to a package index."""
    settings = [
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith("PIP_") or name.lower().endswith("_proxy") or name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    ]
    folders = ["/etc/ssl", *filter(os.path.isdir, os.environ.get("PIP_FIND_LINKS", "").split())]
    binds = [word for folder in folders for word in ("--bind", folder)]
    return [*DEBIAN_ROOT, "run", *binds, "env", "-C", str(COPY), *settings, *command]


def take_pip_settings() -> None:
    for name in PIP_SETTINGS:
        here, there = Path("/", name), BARE / "root" / name
        if here.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(here, there)


def copy_tracked_files() -> None:
    """All that a clone would have; changes that are not committed yet too."""
    shutil.rmtree(COPY, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        target = COPY / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)


def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, stdout=sys.stderr, check=False)


if __name__ == "__main__":
    main()
