"""``dlora-edge selftest``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dlora.edge.choices import EngineName
from dlora.protocol.limits import MAX_THREADS

from .options import JsonOption
from .output import escaped, print_result


def selftest(
    bundle: Annotated[Path, typer.Option("--bundle", help="Bundle directory, from dlora-export.")],
    threads: Annotated[int, typer.Option(help="Compute threads; 0: one for each core.", min=0, max=MAX_THREADS)] = 0,
    engine: Annotated[
        Literal["all", EngineName],
        typer.Option(help="Which to try; all: every one that bundle and device have, side by side."),
    ] = "all",
    json_output: JsonOption = False,
) -> None:
    """Run every graph of a bundle on its golden vectors: is this device right, and how fast?"""
    from dlora.edge.engine.bundle import Bundle

    from .golden import run_selftest

    result = run_selftest(Bundle.open(bundle, verify=True), threads, engine)
    print_result(result, show, json_output=json_output)
    if not result["passed"]:
        raise typer.Exit(1)


def show(result: dict[str, Any]) -> None:
    """Print a self-test for people."""
    from rich.console import Console
    from rich.table import Table

    several = len(result["engines"]) > 1
    table = Table(title=f"{escaped(result['bundle'])} on {result['engine']}", title_justify="left")
    for name in ("graph", "key"):
        table.add_column(name, overflow="fold")  # names that are cut look alike
    table.add_column("tolerance", justify="right")
    for name in result["engines"]:
        for column in ("error", "ms"):
            table.add_column(f"{name} {column}" if several else column, justify="right")
    table.add_column("")
    for row in result["graphs"]:
        verdict = "[green]ok[/]" if row["passed"] else "[red]WRONG[/]"
        found = [
            cell
            for name in result["engines"]
            for cell in (f"{row['engines'][name]['error']:.1e}", f"{row['engines'][name]['ms']:.2f}")
        ]
        table.add_row(escaped(row["graph"]), escaped(row["key"]), f"{row['tolerance']:.1e}", *found, verdict)
    console = Console()
    console.print(table)
    if result["passed"]:
        console.print("Every graph gives what torch gave at export.")
    else:
        console.print("[red]Some graphs are wrong on this device:[/] do not train here; update the engine.")
