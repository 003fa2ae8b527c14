"""The command line of ``dlora-edge``: its commands. What each of them computes with is loaded when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from dlora.protocol.version import SOFTWARE_VERSION

from . import adapters, chat, compare, data, doctor, evaluate, generate, info, plan, report, selftest, serve, train
from .help_panels import PanelledCommand

app = typer.Typer(
    help="Fine-tune a language model that this device cannot hold. Data, labels, adapters stay here.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dlora-edge {SOFTWARE_VERSION}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# In the order in which --help shows them.
for command in (
    data.data, plan.plan, train.train, train.resume, report.report, compare.compare, evaluate.evaluate,
    generate.generate, chat.chat, serve.serve, selftest.selftest, info.info, doctor.doctor,
):  # fmt: skip
    app.command(cls=PanelledCommand)(command)
app.add_typer(adapters.app, name="adapters")
