"""What every command prints alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def warn(line: str) -> None:
    """One line on stderr about something that went wrong and was dealt with."""
    from dlora.edge.run.display import Display

    Display().warn(line)


def print_result(result: dict[str, Any], show: Callable[[dict[str, Any]], None], *, json_output: bool) -> None:
    """Print a command's result: as one JSON object, or as ``show`` does for people."""
    if json_output:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        show(result)
