"""Puts ``dlora-edge`` and its service into a Debian package: ``make edge-deb ARCH=x86_64|aarch64``.

The files are those that install.sh lays out, of build/edge/ARCH. It becomes build/edge/dlora-edge_VERSION_ARCH.deb.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from sites import ARCHITECTURES, PACKAGING, ROOT, fail, run, say

DEBIAN = {"x86_64": "amd64", "aarch64": "arm64"}
EDGE = ROOT / "build" / "edge"
STANDALONE = ("systemd-standalone-sysusers", "systemd-standalone-tmpfiles")  # what its scripts call, in containers
TMPFILES = "d /var/lib/dlora-edge 0750 dlora-edge dlora-edge -\n"


def main() -> None:
    """Build one package and print where it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", choices=ARCHITECTURES, default=platform.machine())
    parser.add_argument("--version", default=software_version(), help="of the package; by default dlora's")
    parser.add_argument("--out", type=Path, default=EDGE)
    options = parser.parse_args()
    if shutil.which("dpkg-deb") is None:
        fail("there is no dpkg-deb; Debian's package dpkg has it")
    with tempfile.TemporaryDirectory(dir=EDGE) as place:
        tree = Path(place) / "tree"
        lay_out(tree, options.arch, options.version)
        name = f"dlora-edge_{options.version}_{DEBIAN[options.arch]}.deb"
        say(f"packing {name}")
        run(["dpkg-deb", "--root-owner-group", "-Zxz", "--build", tree, options.out / name])
    print(options.out / name)


def software_version() -> str:
    """By reading: dlora need not be installed here."""
    text = (ROOT / "protocol" / "version.py").read_text()
    return re.findall(r'^SOFTWARE_VERSION: Final = "(.+)"$', text, re.M)[0]


def lay_out(tree: Path, arch: str, version: str) -> None:
    """All that is in the package."""
    folder = EDGE / arch / "dlora-edge-dir"
    if not folder.exists():
        fail(f"there is no {folder.relative_to(ROOT)}; build it: make edge-binary ARCH={arch}")
    where = ["--root", tree, "--prefix", "/usr", "--no-verify"]
    subprocess.run(["sh", PACKAGING / "install.sh", *where, "--binary", folder], check=True, stdout=subprocess.DEVNULL)
    # What is the system's own lies beneath /usr; what lies beneath /etc is its administrator's.
    units = tree / "usr/lib/systemd/system"
    units.parent.mkdir(parents=True)
    (tree / "etc/systemd/system").rename(units)
    (tree / "etc/systemd").rmdir()
    shutil.rmtree(tree / "var")  # made by systemd-tmpfiles, so that dpkg never removes it
    write(tree / "usr/lib/tmpfiles.d/dlora-edge.conf", TMPFILES)
    owner = f"Copyright 2026 {project()['authors'][0]['name']}\n\n"
    write(tree / "usr/share/doc/dlora-edge/copyright", f"{owner}Apache-2.0: /usr/share/common-licenses/Apache-2.0\n")
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink() and path.name != "train.conf":
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    scripts = PACKAGING / "debian"
    (tree / "DEBIAN").mkdir()
    for name in ("postinst", "prerm", "postrm"):
        shutil.copy(scripts / name, tree / "DEBIAN" / name)
        (tree / "DEBIAN" / name).chmod(0o755)
    write(tree / "DEBIAN/conffiles", "/etc/dlora-edge/train.conf\n")
    write(tree / "DEBIAN/control", control(tree, arch, version))


def control(tree: Path, arch: str, version: str) -> str:
    """What dpkg reads first."""
    glibc = json.loads((EDGE / arch / "report.json").read_text())["glibc_floor"]
    kilobytes = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file() and not path.is_symlink()) // 1024
    fields = {
        "Package": "dlora-edge",
        "Version": version,
        "Architecture": DEBIAN[arch],
        "Maintainer": f"{project()['authors'][0]['name']} <dlora@example.org>",
        "Installed-Size": kilobytes,
        "Depends": f"libc6 (>= {glibc}), zlib1g, " + ", ".join(f"systemd | {name}" for name in STANDALONE),
        "Recommends": "ca-certificates",
        "Section": "science",
        "Priority": "optional",
        "Homepage": project()["urls"]["Repository"],
        "Description": "fine-tune a language model that this device cannot hold\n"
        " A server runs the frozen blocks of the model. This device keeps data, labels,\n"
        " adapters and optimiser, and trains. No Python and no torch are needed.",
    }
    return "".join(f"{name}: {value}\n" for name, value in fields.items())


def project() -> dict[str, Any]:
    """What pyproject.toml says of dlora."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    main()
