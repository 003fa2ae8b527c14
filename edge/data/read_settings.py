"""How data are read: what a command's options say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dlora.edge.choices import TooLong, TrainOn
from dlora.edge.settings import Data
from dlora.protocol.errors import UsageError
from dlora.protocol.manifest import Manifest

from .records import Part, parse_columns
from .split import Split

DEFAULT_MAX_LENGTH: Final = 512


@dataclass(frozen=True)
class ReadSettings:
    """How rows are read.

    Attributes:
        columns: our field to the file's column.
        max_length: most tokens of an example; ``too_long`` says what happens to longer ones.
        train_on: which tokens are labels.
        part: of a directory that is a data set, as ``read_records`` has it.
    """

    columns: Mapping[str, str] | None = None
    max_length: int = 512
    too_long: TooLong = "error"
    train_on: TrainOn = "answers"
    part: Part = "train"


@dataclass(frozen=True)
class Look:
    """What ``dlora-edge data`` looks for.

    Attributes:
        held_out: data to evaluate on; ``split``: how much of the others is held out where there are none.
        out: a directory for what ``split`` makes, ``train.jsonl`` and ``held-out.jsonl``.
        show: how many of the first rows to show; ``lines``: the rows that begin at these lines, in their place.
    """

    held_out: Path | None = None
    split: Split = 0.0
    out: Path | None = None
    show: int = 0
    lines: Sequence[int] = ()


def read_settings(data: Data, manifest: Manifest) -> ReadSettings:
    """How rows are read. Raises ``UsageError``."""
    columns = parse_columns(data.columns) if data.columns else None
    return ReadSettings(columns, resolve_max_length(data.max_length, manifest), data.too_long, data.train_on)


def resolve_max_length(asked: int | None, manifest: Manifest) -> int:
    """The most tokens of an example: what was asked for, else ``DEFAULT_MAX_LENGTH``,
    or what the base model takes if that is less.

    Raises ``UsageError`` where more is asked for than the base model takes.
    """
    longest = manifest.base_model.max_sequence_length
    if asked is not None and asked > longest:
        raise UsageError(f"--max-length {asked} is over the {longest} tokens that the base model takes; lower it")
    return min(asked or DEFAULT_MAX_LENGTH, longest)
