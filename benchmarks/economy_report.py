"""What stands in the runs of ``economy.py``; not written yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from economy_runs import Finished, Plan


def write_report(finished: Finished, plan: Plan, docs: Path) -> dict[str, Any]:
    """The number of runs."""
    return {"runs": len(finished)}
