"""``dlora-edge compare``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from dlora.protocol.text import one_line

from .options import JsonOption
from .output import print_result, warn

if TYPE_CHECKING:
    from dlora.edge.report.comparison import Comparison

_BEST: Final = " *"
Row = tuple[str, list[str]]


def compare(
    runs: Annotated[list[Path], typer.Argument(help="The --out of each run.")],
    out: Annotated[Path | None, typer.Option(help="Write a page with their curves, too: one HTML file.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Runs side by side: the settings in which they differ, losses, traffic and times, the best of each marked.

    Example:  dlora-edge compare my-adapter my-second-adapter --out comparison.html
    """
    from dlora.edge.files import write_atomically
    from dlora.edge.report.comparison import compare as compare_runs
    from dlora.edge.report.comparison_page import comparison_page

    comparison = compare_runs(runs)
    if out is not None:
        write_atomically(out, comparison_page(comparison))
    for line in comparison.warnings:
        warn(line)
    print_result(comparison.to_json(), lambda _: _show(comparison), json_output=json_output)


def _show(comparison: Comparison) -> None:
    measures = [
        (name, [value + (_BEST if is_best else "") for value, is_best in values]) for name, values in comparison.rows()
    ]
    settings = list(comparison.differing.items())
    if sys.stdout.isatty():
        _print_tables(comparison.names, measures, settings)
    else:
        _print_lines(comparison.names, measures, settings)
    if comparison.best:
        print(f"{_BEST.strip()} the best of its row")


def _print_lines(names: Sequence[str], measures: Sequence[Row], settings: Sequence[Row]) -> None:
    rows = [("", list(names)), *([*settings, ("", [])] if settings else []), *measures]
    cells = [[_cell(name), *map(_cell, values)] for name, values in rows]
    widths = [max(len(_aligned(row[index])) for row in cells if len(row) > index) for index in range(len(cells[0]))]
    for name, *values in cells:
        numbers = (_aligned(value).rjust(width) for value, width in zip(values, widths[1:], strict=False))
        print("  ".join((name.ljust(widths[0]), *numbers)).rstrip())


def _aligned(value: str) -> str:
    """With room for the mark where it has none."""
    return value if value.endswith(_BEST) else value + " " * len(_BEST)


def _cell(text: str) -> str:
    """On one line, and moved to the right where it was."""
    return " " * (len(text) - len(text.lstrip())) + one_line(text)


def _print_tables(names: Sequence[str], measures: Sequence[Row], settings: Sequence[Row]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    for title, rows in (("setting that differs", settings), ("measure", measures)):
        if not rows:
            continue
        table = Table(title, *(escape(_cell(name)) for name in names), box=SIMPLE_HEAD)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, values in rows:
            table.add_row(escape(_cell(name)), *(escape(_aligned(_cell(value))) for value in values))
        Console().print(table)
