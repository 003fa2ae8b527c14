"""Options that several commands have, each once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlora.protocol.limits import MAX_THREADS

from .output import warn

if TYPE_CHECKING:
    from dlora.edge.wire.credentials import Credentials


class WireDtype(StrEnum):
    """How hidden states and gradients cross the wire."""

    fp16 = "fp16"
    fp32 = "fp32"


class Schedule(StrEnum):
    """Learning-rate schedules."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Score(StrEnum):
    """What kill-and-revive ranks units by."""

    change = "change"
    sensitivity = "sensitivity"
    grad = "grad"
    norm = "norm"
    random = "random"
    static = "static"
    last = "last"


class UnitKind(StrEnum):
    """What kill-and-revive switches."""

    block = "block"
    group = "group"


class OnKill(StrEnum):
    """What a killed unit does at first."""

    fade = "fade"
    bypass = "bypass"
    hold_forward = "hold_forward"


class Keep(StrEnum):
    """Which adapter a run saves in the end."""

    last = "last"
    best = "best"


class TooLong(StrEnum):
    """What happens to examples longer than --max-length."""

    error = "error"
    truncate = "truncate"
    skip = "skip"


class EngineChoice(StrEnum):
    """What runs the bundle's graphs."""

    auto = "auto"
    onnx = "onnx"
    executorch = "executorch"


class EnginesChoice(StrEnum):
    """What selftest tries."""

    all = "all"
    onnx = "onnx"
    executorch = "executorch"


BundleOption = Annotated[Path, typer.Option("--bundle", help="Bundle directory, from dlora-export.")]
ServerOption = Annotated[str, typer.Option("--server", help="Server address, ws://HOST:PORT or wss://HOST:PORT.")]
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
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
MaxLengthOption = Annotated[
    int | None, typer.Option(help="Longest example, in tokens; 512 by default, or what the model takes.", min=2)
]
TooLongOption = Annotated[TooLong, typer.Option(help="Examples over --max-length: error, truncate or skip them.")]
ColumnsOption = Annotated[str | None, typer.Option(help="For CSV: prompt=COLUMN,completion=COLUMN or text=COLUMN.")]

ThreadsOption = Annotated[int, typer.Option(help="Compute threads; 0: one for each core.", min=0, max=MAX_THREADS)]

EngineOption = Annotated[
    EngineChoice,
    typer.Option(help="What runs the graphs: onnx, executorch or auto, which is ONNX Runtime, or else what there is."),
]


def load_credentials(
    token_file: Path | None, ca: Path | None, client_cert: Path | None, client_key: Path | None, insecure: bool
) -> Credentials:
    """What the options and ``DLORA_TOKEN`` say; warns on stderr where others can read the token."""
    from dlora.edge.wire.credentials import Credentials

    return Credentials.load(
        token_file, ca=ca, client_cert=client_cert, client_key=client_key, insecure=insecure, warn=warn
    )
