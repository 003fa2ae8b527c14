"""Helpers of this folder are plain modules, as those of the one above."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
