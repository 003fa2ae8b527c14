"""Where this device keeps what is its own, whatever run it is in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import platformdirs

STATE_VARIABLE: Final = "DLORA_EDGE_STATE"


def state_directory(named: Path | None = None) -> Path:
    """``named``, else ``$DLORA_EDGE_STATE``, else the user's state directory."""
    chosen = named or os.environ.get(STATE_VARIABLE)
    return Path(chosen) if chosen else platformdirs.user_state_path("dlora-edge")
