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
from .split import Split, parse_split

DEFAULT_MAX_LENGTH: Final = 512


@dataclass(frozen=True)
class ReadSettings:
    """How rows are read.

    Attributes:
        columns: our field to the file's column.
        max_length: most tokens of an example; ``too_long`` says what happens to longer ones.
        train_on: which tokens are labels.
        part: of a directory that is a data set, as ``read_records`` has it.
        split: how much of the rows is held out.
    """

    columns: Mapping[str, str] | None = None
    max_length: int = 512
    too_long: TooLong = "error"
    train_on: TrainOn = "answers"
    part: Part = "train"
    split: Split = 0.0


@dataclass(frozen=True)
class Look:
    """What ``dlora-edge data`` looks for.

    Attributes:
        held_out: data to evaluate on.
        out: a directory for the parts where some rows are held out, ``train.jsonl`` and ``held-out.jsonl``.
        show: how many of the first rows to show; ``lines``: the rows that begin at these lines, in their place.
    """

    held_out: Path | None = None
    out: Path | None = None
    show: int = 0
    lines: Sequence[int] = ()


def read_settings(data: Data, manifest: Manifest) -> ReadSettings:
    """How rows are read; some are held out where no other data are named for that. Raises ``UsageError``."""
    columns = parse_columns(data.columns) if data.columns else None
    max_length = resolve_max_length(data.max_length, manifest)
    split = parse_split(data.hold_out) if data.hold_out and data.eval is None else 0.0
    return ReadSettings(columns, max_length, data.too_long, data.train_on, split=split)


def resolve_max_length(asked: int | None, manifest: Manifest) -> int:
    """The most tokens of an example: what was asked for, else ``DEFAULT_MAX_LENGTH``,
    or what the base model takes if that is less.

    Raises ``UsageError`` where more is asked for than the base model takes.
    """
    longest = manifest.base_model.max_sequence_length
    if asked is not None and asked > longest:
        raise UsageError(f"--max-length {asked} is over the {longest} tokens that the base model takes; lower it")
    return min(asked or DEFAULT_MAX_LENGTH, longest)
