"""The fields of ``Settings`` as options of a command, and what a command line, a file and the environment say of them.

The last that says something counts: the default, ``--config``, the environment, ``--set``, an option.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from dlora.edge.files import read_small, write_atomically
from dlora.edge.settings import Field, Settings, fields_of, read_path, read_settings
from dlora.protocol.errors import UsageError
from dlora.protocol.structure_words import structure_words
from dlora.protocol.usage_words import meant_option

from .help_panels import HelpAllOption
from .options import grouped_parameters, with_group_values

_MOST_BYTES: Final = 1 << 20  # of a file with settings
_METAVARS: Final[dict[Any, str]] = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
_in_file_panel = functools.partial(typer.Option, rich_help_panel="Settings in a file")
_FILE: Final[dict[str, Any]] = {
    "config": Annotated[
        Path | None, _in_file_panel("--config", help="Settings in a TOML file, in sections: --write-config makes one.")
    ],
    "set_": Annotated[
        list[str] | None,
        _in_file_panel(
            "--set", metavar="SECTION.KEY=VALUE", help="One of them by itself; those without an option, too."
        ),
    ],
    "write_config": Annotated[
        Path | None,
        _in_file_panel(
            "--write-config", help="Write all settings, as they are now, into such a file, and do no more.", hidden=True
        ),
    ],
}


def takes_settings(
    *names: str,
    required: Sequence[str] = (),
    has_file: bool = False,
    is_change: bool = False,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command whose first parameter is ``settings: Settings``, made from its options.

    Args:
        names: of the options; none: all fields.
        required: of these, those without which the command does nothing.
        has_file: whether ``--config``, ``--write-config`` and ``--set`` belong to it.
        is_change: whether it is given what was said alone, as a dict, and no defaults.
        changes: by name, what is otherwise for this command: ``default`` and ``help``.

    Another parameter of the command that is a dataclass gives way to the options that are its fields.
    """
    changed = changes or {}
    chosen = [field for field in fields_of() if field.depth != "rare" and (not names or field.parameter in names)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        groups, parameters = grouped_parameters(own)
        arguments = [each for each in parameters if each.default is inspect.Parameter.empty]
        options = [
            _option(each, changed, is_required=each.parameter in required, is_change=is_change) for each in chosen
        ]
        file = [_parameter(name, kind) for name, kind in _FILE.items() if has_file]
        rest = [each for each in parameters if each.default is not inspect.Parameter.empty]
        if any(field.depth == "more" for field in chosen):
            rest.append(_parameter("help_all", HelpAllOption, default=False))

        @functools.wraps(command)
        def flat(context: typer.Context, **given: Any) -> None:
            given.pop("help_all", None)  # has ended the command
            start = {name: change["default"] for name, change in changed.items() if "default" in change}
            options_given = {each.parameter: given.pop(each.parameter) for each in chosen}
            written = {name: given.pop(name, None) for name in _FILE}
            said, variables = _layered(options_given, start, written, has_file=has_file)
            variables += [each.variable for each in chosen if _is_of_environment(context, each)]
            if variables:
                typer.echo(f"from the environment: {', '.join(variables)}", err=True)
            if is_change:
                command(said, **with_group_values(groups, given))
                return
            settings = read_settings(said)
            if written["write_config"] is not None:
                save_config(written["write_config"], settings)
                return
            for field in chosen:
                if field.parameter in required and field.value_in(settings) is None:
                    raise UsageError(f"{field.words} is missing; {context.command_path} --help says more")
            command(settings, **with_group_values(groups, given))

        signature = [_parameter("context", typer.Context, inspect.Parameter.empty), *arguments, *options, *file, *rest]
        flat.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in signature]
        )
        flat.__annotations__ = {each.name: each.annotation for each in signature}
        return flat

    return decorate


def _is_of_environment(context: typer.Context, field: Field) -> bool:
    source = context.get_parameter_source(field.parameter)
    return source is not None and source.name == "ENVIRONMENT"


def _parameter(name: str, kind: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _option(
    field: Field, changed: Mapping[str, Mapping[str, Any]], *, is_required: bool, is_change: bool
) -> inspect.Parameter:
    """A field as typer takes it; without a default, so that one sees what was given, and without its limits, which are
    checked wherever it comes from."""
    change = changed.get(field.parameter, {})
    default = change.get("default", field.default)
    text = change.get("help", field.help) + (" (required)" if is_required else "")
    if not (is_change or default in (None, "", ()) or isinstance(default, bool)):
        text += f" (default: {f'{default:g}' if isinstance(default, float) else default})"
    is_switch = is_change and field.kind is bool  # what a run has on can be turned off
    option = typer.Option(
        f"--{field.option}/--{'no-' + field.option}" if is_switch else f"--{field.option}",
        help=text,
        rich_help_panel=field.panel,
        metavar=field.metavar or _METAVARS.get(field.given_kind),
        envvar=field.variable,
        show_envvar=False,
        show_default=False,
        hidden=field.depth == "more",
    )
    kind = list[str] if field.default == () else field.kind
    return _parameter(field.parameter, Annotated[kind | None, option])


def _layered(
    options: Mapping[str, Any], start: Mapping[str, Any], written: Mapping[str, Any], *, has_file: bool
) -> tuple[dict[str, Any], list[str]]:
    """All that was said, by the names of options, and the environment variables that said what has no option."""
    given: dict[str, Any] = dict(start)
    if written["config"] is not None:
        given |= load_config(written["config"])
    variables = []
    for field in fields_of() if has_file else ():
        if field.depth == "rare" and (text := os.environ.get(field.variable)):
            given[field.parameter] = _from_text(field, text, field.variable)
            variables.append(field.variable)
    given |= read_set(written["set_"] or ())
    for name, value in options.items():
        if value is not None:
            given[name] = tuple(value) if isinstance(value, list) else value
    return given, variables


def read_set(texts: Sequence[str]) -> dict[str, Any]:
    """What ``--set`` says, by the names of options. Raises ``UsageError``."""
    given, fields = {}, {field.path: field for field in fields_of()}
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text[:80]!r}: write SECTION.KEY=VALUE, as --set kill_revive.probation=25")
        if path not in fields:
            raise UsageError(f"--set {path[:80]}: there is no such setting{_meant(path, fields)}")
        given[fields[path].parameter] = _from_text(fields[path], value, f"--set {path}")
    return given


def _meant(name: str, names: Iterable[str]) -> str:
    """What to write in place of a name that is no setting's."""
    hint = meant_option(f"--{name}", [f"--{each}" for each in names]).replace("--", "")
    return hint or "; docs/reference/settings.md has all"


def _from_text(field: Field, text: str, words: str) -> Any:
    """A value that was written as text. Raises ``UsageError``."""
    try:
        value = text.split(",") if field.default == () else text
        return msgspec.convert(value, field.kind, strict=False, dec_hook=read_path)
    except msgspec.ValidationError as error:
        raise UsageError(f"{words} {text[:80]!r}: {structure_words(error)}") from None


def load_config(path: Path) -> dict[str, Any]:
    """What a file says, by sections, or by the names of options.

    Raises ``UsageError`` for a file that cannot be read, and for a setting that there is not, or cannot be.
    """
    try:
        found = tomllib.loads(read_small(path, _MOST_BYTES).decode())
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path} is not valid TOML: {error}") from None
    fields = fields_of()
    by_path, by_name = {each.path: each for each in fields}, {each.parameter: each for each in fields}
    values: dict[str, Any] = {}
    for key, value in found.items():
        is_section = isinstance(value, dict) and key in Settings.__struct_fields__
        for name, each in value.items() if is_section else [(key, value)]:
            word = name.replace("-", "_")
            field = by_path.get(f"{key}.{word}") if is_section else by_name.get(word)
            if field is None:
                in_section = [other.key for other in fields if other.section == key]
                names = in_section if is_section else [other.option for other in fields]
                where = f" in [{key}]" if is_section else ""
                raise UsageError(f"--config {path}: {name!r} is no setting{where}{_meant(name, names)}")
            if field.parameter in values:
                raise UsageError(f"--config {path} says {field.path} twice")
            values[field.parameter] = tuple(each) if isinstance(each, list) else each
    try:
        read_settings(values)  # so that what is wrong is said to be of the file
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from None
    return values


def config_text(settings: Settings) -> str:
    """A file that says ``settings``; a default stands there as a comment, with what the setting is for."""
    lines = ["# Settings of a run: dlora-edge train --config FILE", ""]
    section = None
    for field in fields_of():
        if field.section != section:
            section = field.section
            lines += [f"[{section}]", ""]
        value = field.value_in(settings)
        lines += textwrap.wrap(field.help, 100, initial_indent="# ", subsequent_indent="# ")
        if value is None:
            lines.append(f"# {field.key} =")
        else:
            text = f"{field.key} = {_toml(value)}"
            lines.append(f"# {text}" if value == field.default else text)
        lines.append("")
    return "\n".join(lines)


def save_config(path: Path, settings: Settings) -> None:
    """Write them into a new file. Raises ``UsageError`` where it is there, and ``StorageError``."""
    if path.exists():
        raise UsageError(f"--write-config {path} is there already; remove it, or choose another name")
    write_atomically(path, config_text(settings).encode())


def _toml(value: Any) -> str:
    # TOML's strings, numbers, booleans and lists of them are JSON's.
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
