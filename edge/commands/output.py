"""What every command prints alike."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from dlora.protocol.text import visible, visible_json


def warn(line: str) -> None:
    """One line on stderr about something that went wrong and was dealt with."""
    from dlora.edge.run.display import Display

    Display().warn(line)


def print_result(result: dict[str, Any], show: Callable[[dict[str, Any]], None], *, json_output: bool) -> None:
    """Print a command's result: as one JSON object, or as ``show`` does for people."""
    if json_output:
        print(visible_json(result, indent=1))
    else:
        show(result)


def print_answer(piece: str) -> None:
    """Print a piece of what a model says. It may say anything, so a terminal gets it ``visible``; a pipe and a file get
    it as it is, as what is compared or used further must be."""
    print(visible(piece) if sys.stdout.isatty() else piece, end="", flush=True)


def escaped(text: str) -> str:
    """Somebody else's words for a line on rich's console: no markup, and nothing that steers it or begins a line."""
    from rich.markup import escape

    return escape(visible(text).replace("\n", r"\n").replace("\t", r"\t"))
