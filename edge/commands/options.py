"""Options that several commands have, each once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from dlora.edge.choices import EngineChoice, TooLong, TrainOn
from dlora.protocol.choices import Send
from dlora.protocol.limits import MAX_STEPS, MAX_THREADS

from .output import warn

if TYPE_CHECKING:
    from dlora.edge.wire.credentials import Credentials

BundleOption = Annotated[Path, typer.Option("--bundle", help="Bundle directory, from dlora-export.")]
OptionalServerOption = Annotated[
    str | None,
    typer.Option("--server", help="Server: HOST:PORT, ws://HOST:PORT or wss://HOST:PORT (TLS); not with --mode local."),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(help="PEFT adapter, a directory or a name of dlora-edge adapters; none: the base model."),
]
AdaptersOption = Annotated[
    Path | None,
    typer.Option(
        "--adapters",
        envvar="DLORA_ADAPTERS",
        help="Directory of adapters by name; one of the user's own by default.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
MaxLengthOption = Annotated[
    int | None, typer.Option(help="Longest example, in tokens; 512 by default, or what the model takes.", min=2)
]
TooLongOption = Annotated[TooLong, typer.Option(help="Examples over --max-length: error, truncate or skip them.")]
ColumnsOption = Annotated[
    str | None,
    typer.Option(help="Columns of a table: prompt=COLUMN,completion=COLUMN, text=COLUMN or messages=COLUMN."),
]
TrainOnOption = Annotated[
    TrainOn,
    typer.Option(
        help="Which tokens are learnt: answers, those of the assistant's turns or of the completion; all, prompts too; "
        "last, those of the last answer."
    ),
]
SplitOption = Annotated[
    str,
    typer.Option(
        help="Share of the rows that is held out, where there is no --eval; 0: none. auto: a tenth, at most 200, and "
        "none of fewer than 20."
    ),
]
SendOption = Annotated[
    Send,
    typer.Option(
        help="What says a text to the server: embeddings, or token-ids, a hundredth of their size. The server can find "
        "the tokens either way; SECURITY.md says how."
    ),
]
WireDtypeOption = Annotated[
    str,
    typer.Option(help="Precision on the wire: int8, fp16 or fp32; and others for some roles: int8,embeddings=fp16."),
]
ThreadsOption = Annotated[int, typer.Option(help="Compute threads; 0: one for each core.", min=0, max=MAX_THREADS)]
EngineOption = Annotated[
    EngineChoice,
    typer.Option(help="What runs the graphs: onnx, executorch or auto, which is ONNX Runtime, or else what there is."),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Memory that plan and --mode auto may count on, 2GB or 500MB; by default what is free.",
    ),
]
EvalDataOption = Annotated[
    Path | None, typer.Option("--eval", help="Data to evaluate on; without it --split holds some of --data out.")
]
EpochsOption = Annotated[float, typer.Option(help="Passes over the data.", min=0.0)]
StepsOption = Annotated[
    int | None, typer.Option(help="Optimizer steps; overrides --epochs.", min=1, max=MAX_STEPS)
]
BatchSizeOption = Annotated[int, typer.Option(help="Sequences of a micro-batch.", min=1)]
GradAccumOption = Annotated[int, typer.Option(help="Micro-batches of a step.", min=1)]
CacheKeyOption = Annotated[
    Path | None,
    typer.Option(
        help="With --mode trunk or local: encrypt the hidden states that are kept, with the key in this file "
        "(openssl rand -hex 32). Needs the extra encryption."
    ),
]
TokenFileOption = Annotated[
    Path | None, typer.Option(help="File with the token that lets this device in; else DLORA_TOKEN.")
]
CaOption = Annotated[Path | None, typer.Option(help="Trust only servers that this authority signed (PEM).")]
ClientCertOption = Annotated[Path | None, typer.Option(help="This device's certificate (PEM).")]
ClientKeyOption = Annotated[Path | None, typer.Option(help="Its key, where that is another file (PEM).")]
InsecureOption = Annotated[bool, typer.Option("--insecure", help="Send the token over plain ws:// all the same.")]
MaxRetryOption = Annotated[
    float | None,
    typer.Option(
        help="Seconds that the server may be gone, or say nothing new; 0: give up as soon as it is lost. Without it: "
        "for ever once the run has begun, but a first connection that fails ends it.",
        min=0,
    ),
]


@dataclass(frozen=True)
class CredentialOptions:
    """What the device shows the server, and whom it trusts, as a group of options."""

    token_file: TokenFileOption = None
    ca: CaOption = None
    client_cert: ClientCertOption = None
    client_key: ClientKeyOption = None
    insecure: InsecureOption = False

    def load(self) -> Credentials:
        """What they and ``DLORA_TOKEN`` say; warns on stderr where others can read the token. Raises ``UsageError``."""
        from dlora.edge.wire.credentials import Credentials

        return Credentials.load(**asdict(self), warn=warn)


def _fields_of(group: type) -> dict[str, inspect.Parameter]:
    """A group's fields as parameters; those of a group that it extends are of another module, and of its words."""
    hints = get_type_hints(group, include_extras=True)
    return {
        name: each.replace(annotation=hints[name]) for name, each in inspect.signature(group).parameters.items()
    }


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` as typer takes it: a parameter that is a dataclass gives way to the options that are its fields."""
    parameters = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {
        name: each.annotation for name, each in parameters.items() if is_dataclass(each.annotation)
    }
    fields = {name: _fields_of(group) for name, group in groups.items()}
    options = [option for name, each in parameters.items() for option in fields.get(name, {name: each}).values()]

    @functools.wraps(command)
    def flat(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{option: given.pop(option) for option in fields[name]})
        command(**given)

    flat.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    flat.__annotations__ = {option.name: option.annotation for option in options}
    return flat
