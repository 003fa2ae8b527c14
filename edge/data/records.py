"""Rows of data, each with its place: of one file of any kind that is read, or of all of them in a directory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from dlora.protocol.errors import DataError, UsageError

from .csv_rows import csv_rows
from .json_array import array_rows
from .lines import BOM, file_errors, json_lines
from .parquet_rows import parquet_rows
from .text_parts import TextPart, text_parts

FIELDS: Final = ("messages", "prompt", "completion", "text")
_KNOWN_COLUMNS: Final = (*FIELDS, "instruction", "input", "output")
Part = Literal["train", "test"]
_PART_NAMES: Final = {
    "train": "train", "test": "test", "held-out": "test", "eval": "test", "validation": "validation",
    "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_NUMBERED: Final = re.compile(r"[-_.]\d+.*\Z")  # train-00000-of-00002
TEXT_SUFFIXES: Final = (".txt", ".md", ".markdown")
_ROW_SUFFIXES: Final = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file.

    Attributes:
        place: ``file:line``, as every error about it begins; of a Parquet file, the number of the row.
        fields: column or key to value.
        part: where the record is a part of a document, and its only field ``text``; None: it is a row.
    """

    place: str
    fields: dict[str, Any]
    part: TextPart | None = None


def parse_columns(text: str) -> dict[str, str]:
    """``"prompt=question,completion=answer"`` as a mapping of our fields to the file's columns.

    Raises ``UsageError``.
    """
    columns = {}
    for part in text.split(","):
        ours, separator, theirs = (piece.strip() for piece in part.partition("="))
        if not separator or not theirs or ours not in FIELDS:
            raise UsageError(
                f"--columns {part.strip()!r} is not understood; write prompt=COLUMN,completion=COLUMN or text=COLUMN"
            )
        columns[ours] = theirs
    if set(columns) not in ({"text"}, {"prompt", "completion"}, {"messages"}):
        raise UsageError("--columns needs text=COLUMN, messages=COLUMN, or both prompt=COLUMN and completion=COLUMN")
    return columns


def read_records(
    path: Path,
    columns: Mapping[str, str] | None = None,
    on_file: Callable[[Path], None] = lambda _: None,
    part: Part = "train",
) -> Iterator[Record]:
    """The records of a file, or of every file of a directory and the directories in it, in the order of their names.

    A directory that has files named after parts (``train.json``, ``test-00001.parquet``) is a data set: of it those of
    ``part`` are read; ``validation`` in place of ``test`` where there is none.

    ``.csv`` and ``.tsv`` are tables, ``.parquet`` is one too, ``.txt`` and ``.md`` documents; any other file is JSON,
    Lines or one array. In a directory, files of other names are passed over, and what begins with a dot.

    Args:
        columns: our field to the file's column, from ``parse_columns``.
        on_file: called with each file before it is read.

    Raises ``DataError`` with file and line for whatever cannot be read; ``MissingExtraError`` for Parquet without
    pyarrow.
    """
    for file in files_of(path, part):
        on_file(file)
        for record in _read_file(file, columns):
            yield record if columns is None or record.part is not None else _renamed(record, columns)


def files_of(path: Path, part: Part = "train") -> list[Path]:
    """``path``, or the data files of a directory, sorted: where some of them are named after parts, those of ``part``.

    Raises ``DataError`` for a directory without any.
    """
    try:
        is_directory = path.is_dir()
    except OSError:  # a name that no system takes: reading it says so
        is_directory = False
    if not is_directory:
        return [path]
    found = []
    for directory, inner, names in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in (*TEXT_SUFFIXES, *_ROW_SUFFIXES):
                found.append(Path(directory) / name)
    if not found:
        kinds = ", ".join((*TEXT_SUFFIXES, *_ROW_SUFFIXES))
        raise DataError(f"{path}: no data in this directory; {kinds} files are read, and any other by its own name")
    return _of_part(path, sorted(found), part)


def _of_part(path: Path, files: list[Path], part: Part) -> list[Path]:
    """Data sets lie in directories with a file a part: what is tested on must not be learnt."""
    rows = [file for file in files if file.parent == path and file.suffix.lower() in _ROW_SUFFIXES]
    parts = {file: _PART_NAMES[name] for file in rows if (name := _NUMBERED.sub("", file.stem.lower())) in _PART_NAMES}
    if not parts:
        return files
    chosen = [file for file, name in parts.items() if name == part]
    if part == "test" and not chosen:
        chosen = [file for file, name in parts.items() if name == "validation"]
    if not chosen:
        there = ", ".join(file.name for file in parts)
        raise DataError(f"{path}: has {there}, and no file of the part {part!r}; name the file that is meant")
    return chosen


def _read_file(path: Path, columns: Mapping[str, str] | None) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return (Record(f"{path}:{number}", {"text": text}, part) for number, text, part in text_parts(path))
    known = _KNOWN_COLUMNS if columns is None else columns.values()
    if suffix == ".csv":
        rows = csv_rows(path, [*known])
    elif suffix == ".tsv":
        rows = csv_rows(path, [*known], delimiters="\t")
    elif suffix == ".parquet":
        rows = parquet_rows(path)
    else:
        rows = array_rows(path) if _begins_array(path) else json_lines(path)
    return (Record(f"{path}:{number}", fields) for number, fields in rows)


def _begins_array(path: Path) -> bool:
    # Read as lines first: what is no regular file can be read only once, and is taken for JSON Lines.
    if not path.is_file():
        return False
    with file_errors(path), path.open("rb") as file:
        return file.read(1 << 16).removeprefix(BOM).lstrip()[:1] == b"["


def _renamed(record: Record, columns: Mapping[str, str]) -> Record:
    for theirs in columns.values():
        if theirs not in record.fields:
            there = ", ".join(map(repr, record.fields)) or "none"
            raise DataError(f"{record.place}: no column {theirs!r}; there are {there}")
    kept = {ours: record.fields[theirs] for ours, theirs in columns.items()}
    if "messages" in columns:
        kept |= {name: record.fields[name] for name in ("tools", "chat_template_kwargs") if name in record.fields}
    return Record(record.place, kept)
