"""The command line of ``dlora-cloud``: its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from dlora.protocol.version import SOFTWARE_VERSION

from . import audit, serve, tokens

app = typer.Typer(
    help="Serve the frozen blocks of a language model to devices that fine-tune it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dlora-cloud {SOFTWARE_VERSION}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(serve.serve)
app.command()(audit.audit)
app.add_typer(tokens.app, name="token")
