"""A command that has a command beside it: ``dlora-export MODEL …`` exports, ``dlora-export merge MODEL …`` merges.

``dlora-export`` had no commands before it had a second thing to do, and what was typed then means the same now.
"""

from __future__ import annotations

from typing import Any, ClassVar

from typer.core import TyperCommand


class CommandWithSubcommands(TyperCommand):
    """Runs another command where that one's name is its first argument.

    Attributes:
        commands: the others, by name; set when they are known.
    """

    commands: ClassVar[dict[str, Any]] = {}

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the arguments, as those of the command that they name."""
        if args and args[0] in self.commands:
            other = self.commands[args[0]]
            return other.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was parsed."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)
