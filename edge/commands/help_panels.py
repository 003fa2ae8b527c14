"""How ``--help`` shows a command's options: in panels, those that many need; ``--help-all`` shows all of them."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand

from dlora.edge.settings import VARIABLE

# Each option has an environment variable beside its name on the command line, but for these.
NO_VARIABLES: Final = ("help", "help_all", "config", "write_config", "set_", "version")


class PanelledCommand(TyperCommand):
    """A command whose options are in panels, each panel in one place, and some shown by ``--help-all`` only."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        options = [each for each in self.params if each.param_type_name == "option"]
        for option in options:
            if not option.envvar and option.name not in NO_VARIABLES:
                option.envvar = f"{VARIABLE}{(option.name or '').upper()}"
                option.show_envvar = False  # type: ignore[attr-defined]
        panels = list(dict.fromkeys(getattr(each, "rich_help_panel", None) for each in self.params))
        # What is in no panel comes first: the command's own.
        panels.sort(key=lambda panel: panel is not None)
        self.params.sort(key=lambda each: panels.index(getattr(each, "rich_help_panel", None)))


def _show_all(context: typer.Context, is_asked: bool) -> None:
    if not is_asked:
        return
    for each in context.command.params:
        each.hidden = False  # type: ignore[attr-defined]
    typer.echo(context.get_help())
    raise typer.Exit


HelpAllOption = Annotated[
    bool, typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show all options, and exit.")
]
