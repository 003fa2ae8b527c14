"""``dlora-edge doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dlora.protocol.text import one_line

from .options import CredentialOptions, JsonOption, with_groups
from .output import print_result


@with_groups
def doctor(
    bundle: Annotated[Path | None, typer.Option(help="Also check this bundle, and what it takes.")] = None,
    server: Annotated[str | None, typer.Option(help="Also try this server.")] = None,
    credential_options: CredentialOptions = CredentialOptions(),
    json_output: JsonOption = False,
) -> None:
    """Check this device: versions, memory, engine, bundle, server; and say what to do about each problem."""
    from .checks import run_checks

    result = run_checks(bundle, server, credential_options.load())
    print_result(result, show, json_output=json_output)
    if not result["ok"]:
        raise typer.Exit(1)


def show(result: dict[str, Any]) -> None:
    """Print the checks for people."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print(f"dlora-edge {result['software']}, wire versions {result['protocol_versions']}")
    for check in result["checks"]:
        mark = "[green]ok[/]     " if check["ok"] else "[red]PROBLEM[/]"
        found = escape(one_line(check["found"]))
        console.print(f"{mark} [bold]{check['check']}[/]: {found}", highlight=False, soft_wrap=True)
