"""``--config run.toml``: options of a command in a file, under their own names."""

from __future__ import annotations

import json
import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dlora.edge.files import read_small
from dlora.protocol.errors import UsageError
from dlora.protocol.usage_words import meant_option

if TYPE_CHECKING:
    from typer.core import TyperCommand, TyperOption

_MOST_BYTES: Final = 1 << 20
_NO_SETTINGS: Final = ("config", "write_config", "help")


def _use(context: typer.Context, path: Path | None) -> Path | None:
    """Take what the file says in place of defaults: before any other option is looked at."""
    if path is not None:
        context.default_map = {**(context.default_map or {}), **load_config(path, context.command)}  # type: ignore[arg-type]
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Options in a TOML file: lr = 1e-3. What stands on the command line, or in DLORA_EDGE_LR, goes before.",
        is_eager=True,
        callback=_use,
    ),
]
WriteConfigOption = Annotated[
    Path | None,
    typer.Option("--write-config", help="Write all options, as they are now, into such a file, and do no more."),
]


def load_config(path: Path, command: TyperCommand) -> dict[str, Any]:
    """What a file says, by the names of the command's parameters.

    Raises ``UsageError`` for a file that cannot be read, and for an option that the command does not have.
    """
    try:
        found = tomllib.loads(read_small(path, _MOST_BYTES).decode())
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path} is not valid TOML: {error}") from None
    names = {key: option.name or "" for option in _settings_of(command) for key in _keys_of(option)}
    values = {}
    for key, value in found.items():
        name = names.get(key.replace("_", "-"))
        if name is None:
            hint = meant_option(f"--{key}", [f"--{each}" for each in names]).replace("--", "")
            hint = hint or f"; dlora-edge {command.name} --help lists its options"
            raise UsageError(f"--config {path}: {key!r} is no option of {command.name}{hint}")
        if name in values:
            raise UsageError(f"--config {path} says {key!r} twice")
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, dict) for each in value)):
            raise UsageError(f"--config {path}: {key!r} is a table; write options one below the other")
        values[name] = value
    return values


def config_text(values: Mapping[str, Any], command: TyperCommand) -> str:
    """A file that says ``values``, by parameter; a default stands there as a comment, with what the option is for."""
    lines = [f"# Options of dlora-edge {command.name}: dlora-edge {command.name} --config FILE", ""]
    panel = None
    for option in _settings_of(command):
        where = getattr(option, "rich_help_panel", None)
        if where != panel:
            panel = where
            lines += [f"# -- {panel} --", ""]
        value, key = values[option.name or ""], _keys_of(option)[0]
        lines += textwrap.wrap(option.help or "", 100, initial_indent="# ", subsequent_indent="# ")
        if value is None:
            lines.append(f"# {key} =")
        else:
            text = f"{key} = {_toml(value)}"
            lines.append(f"# {text}" if value == option.default else text)
        lines.append("")
    return "\n".join(lines)


def save_config(path: Path, values: Mapping[str, Any], context: typer.Context) -> None:
    """Write the options of the command that runs. Raises ``UsageError`` where the file is there, and ``StorageError``.
    """
    from dlora.edge.files import write_atomically

    if path.exists():
        raise UsageError(f"--write-config {path} is there already; remove it, or choose another name")
    command: Any = context.command
    write_atomically(path, config_text(values, command).encode())


def _settings_of(command: TyperCommand) -> list[TyperOption]:
    return [each for each in command.params if each.name not in _NO_SETTINGS]  # type: ignore[misc]


def _keys_of(option: TyperOption) -> list[str]:
    """The option's own word, and its parameter's."""
    return [option.opts[0].lstrip("-"), (option.name or "").replace("_", "-")]


def _toml(value: Any) -> str:
    # TOML's strings, numbers, booleans and lists of them are JSON's.
    return json.dumps([*map(str, value)] if isinstance(value, list) else _plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
