"""How data are read: what a command's options say of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dlora.edge.choices import TooLong, TrainOn

from .records import Part


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
