"""What each extra of dlora takes on the disk: a fresh virtual environment for each, without pip.

Prints one JSON object; sizes are in MB of 10**6 bytes, all files of site-packages as pip leaves them, bytecode too.
pip's own settings hold, so that a torch build for the CPU is measured where pip is told of one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXTRAS = ("edge", "cloud", "export", "all")
LARGEST = 5


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--extra", action="append", choices=EXTRAS, help="only this one; may be given again")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "extras": {extra: measure(extra) for extra in options.extra or EXTRAS},
    }
    print(json.dumps(result, indent=1))


def measure(extra: str) -> dict[str, Any]:
    """Install ``dlora[extra]`` from this folder into an environment of its own, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="dlora-size-") as directory:
        print(f"installing dlora[{extra}]", file=sys.stderr)
        venv.create(directory, with_pip=True)
        pip = [Path(directory) / "bin" / "python", "-m", "pip"]
        started = time.monotonic()
        subprocess.run([*pip, "install", "--quiet", f"{ROOT}[{extra}]"], check=True, stdout=sys.stderr)
        seconds = time.monotonic() - started
        listed = json.loads(subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True).stdout)
        versions = {package["name"]: package["version"] for package in listed}
        packages = next(Path(directory, "lib").glob("python*/site-packages"))
        folders = {path.name: size(path) for path in packages.iterdir() if not path.name.startswith(("pip", "_dist"))}
        largest = sorted(folders, key=lambda name: -folders[name])[:LARGEST]
        return {
            "mb": round(sum(folders.values()) / 1e6),
            "packages": len(set(versions) - {"pip", "setuptools"}),
            "torch": versions.get("torch"),
            "install_s": round(seconds),
            "largest_mb": {name: round(folders[name] / 1e6) for name in largest},
        }


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder; what is linked is not counted."""
    if not path.is_dir():
        return path.lstat().st_size
    return sum(os.lstat(Path(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)


if __name__ == "__main__":
    main()
