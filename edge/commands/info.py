"""``dlora-edge info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dlora.protocol.text import one_line

from .options import JsonOption
from .output import print_result


def info(
    path: Annotated[Path, typer.Argument(help="A bundle, an adapter or the --out of a run.")],
    json_output: JsonOption = False,
) -> None:
    """Say what a bundle or an adapter is."""
    from .description import describe

    print_result(describe(path), show, json_output=json_output)


def show(result: dict[str, Any]) -> None:
    """Print a description for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table("", Column(overflow="fold"), show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in result.items():
        table.add_row(f"[bold]{name.replace('_', ' ')}[/]", escape(one_line(str(value))))
    Console().print(table)
