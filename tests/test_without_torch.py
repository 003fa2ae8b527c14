"""Suites that also run on aarch64, where no torch is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from without_torch import SUITES

ROOT = Path(__file__).parents[1]


def test_suites_for_arm_need_no_torch() -> None:
    """They pass on this machine without it: a suite that was renamed, or takes torch since, is told at once."""
    blocked = "import sys, pytest; sys.modules['torch'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    suites = [f"tests/test_{suite}.py" for suite in SUITES]
    command = [sys.executable, "-c", blocked, "-q", "-p", "no:cacheprovider", *suites]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
