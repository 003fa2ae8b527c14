"""Settings of the whole test run. Shared helpers are plain modules of this folder, such as ``families``."""

from __future__ import annotations

import sys
from pathlib import Path

# Under --import-mode=importlib pytest puts no test folder on the path.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_finish() -> None:
    """Two threads for torch, where a test has loaded it: most tests must run without it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(2)
