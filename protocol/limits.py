"""Limits that several modules check."""

from __future__ import annotations

from typing import Final

MAX_RANK: Final = 4096  # of a LoRA: a typing slip, or a stranger's file, must not fill the memory
MAX_STEPS: Final = 10**9  # of a run
MAX_THREADS: Final = 1024
MAX_WINDOW: Final = 16  # micro-batches of a session that are under way at a time
USUAL_WINDOW: Final = 4  # likewise, of a server that is not told otherwise
