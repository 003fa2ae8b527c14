"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable

WITHIN_S = 20.0


def eventually(holds: Callable[[], bool]) -> None:
    """Return as soon as it is true; fail where it is not within ``WITHIN_S``."""
    deadline = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)
