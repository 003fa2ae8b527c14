"""Options that several commands have, each once."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

AdapterOption = Annotated[
    Path | None,
    typer.Option(help="PEFT adapter, a directory or a name of dlora-edge adapters; none: the base model."),
]
AdaptersOption = Annotated[
    Path | None,
    typer.Option(
        "--adapters", envvar="DLORA_ADAPTERS", help="Directory of adapters by name; one of the user's own by default."
    ),
]
LendOption = Annotated[
    bool,
    typer.Option(
        "--lend-adapter",
        help="Give the server the adapter, to apply it until the session ends: quickest, and the server then has it.",
    ),
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Say what each answer took.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
RecordOption = Annotated[
    Path | None,
    typer.Option(
        "--record",
        metavar="DIR",
        help="Keep the frames of this run as they cross, in DIR/frames, and in DIR/truth the text, labels, adapter and "
        "gradients that must not: for dlora-cloud audit. Off by default; a few steps, or rows, are enough.",
        hidden=True,
    ),
]


def _fields_of(group: type) -> dict[str, inspect.Parameter]:
    """A group's fields as parameters; those of a group that it extends are of another module, and of its words."""
    hints = get_type_hints(group, include_extras=True)
    return {name: each.replace(annotation=hints[name]) for name, each in inspect.signature(group).parameters.items()}


def grouped_parameters(parameters: Iterable[inspect.Parameter]) -> tuple[dict[str, Any], list[inspect.Parameter]]:
    """The parameters of a command that are dataclasses, by name; and all of them as typer takes them, where such a one
    gives way to the options that are its fields."""
    parameters = list(parameters)
    groups: dict[str, Any] = {each.name: each.annotation for each in parameters if is_dataclass(each.annotation)}
    fields = {name: _fields_of(group) for name, group in groups.items()}
    return groups, [option for each in parameters for option in fields.get(each.name, {each.name: each}).values()]


def with_group_values(groups: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a command is given: its groups, made from the options that are their fields, and all other options."""
    rest = dict(given)
    made = {name: group(**{field: rest.pop(field) for field in _fields_of(group)}) for name, group in groups.items()}
    return rest | made
