"""How much memory a run may count on."""

from __future__ import annotations

import psutil

from dlora.protocol.sizes import parse_size


def available_memory(asked: str | None) -> float:
    """Bytes that a run may take: as ``--memory`` says, or what is available now. Raises ``UsageError``."""
    return float(psutil.virtual_memory().available) if asked is None else parse_size(asked, "--memory")
