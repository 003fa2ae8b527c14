"""``dlora-edge doctor``."""

from __future__ import annotations

from typing import Any

import typer

from dlora.edge.settings import Settings
from dlora.protocol.text import one_line

from .options import JsonOption
from .output import print_result, warn
from .settings_options import takes_settings


@takes_settings(
    "bundle", "server", "token_file", "ca", "client_cert", "client_key", "insecure",
    changes={
        "bundle": {"help": "Also check this bundle, and what it takes."}, "server": {"help": "Also try this server."},
    },
)  # fmt: skip
def doctor(settings: Settings, json_output: JsonOption = False) -> None:
    """Check this device: versions, memory, engine, bundle, server; and say what to do about each problem."""
    from dlora.edge.wire.credentials import Credentials

    from .checks import run_checks

    server = settings.server
    result = run_checks(settings.device.bundle, server.server, Credentials.of(server, warn))
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
