"""Programs of others that only tests need."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest


def find_tool(name: str, *, in_ci: bool = True) -> str:
    """Its path: beside this Python, or on the machine; without it the test is skipped, but where CI is set only if that
    need not have it."""
    places = (str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin")
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        assert not (in_ci and os.environ.get("CI")), f"{name} is not installed"
        pytest.skip(f"{name} is not installed")
    return found
