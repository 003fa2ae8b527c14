"""Rows of a training file, each with its place: JSONL objects or CSV records."""

from __future__ import annotations

import csv
import errno
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

import msgspec

from dlora.protocol.errors import DataError, UsageError

FIELDS: Final = ("messages", "prompt", "completion", "text")
_BOM: Final = b"\xef\xbb\xbf"
MAX_RECORD_BYTES: Final = 8 << 20  # more than any model reads at once; tokenizing takes up to 200 times as much
_TOO_LONG: Final = f"more than {MAX_RECORD_BYTES >> 20} MiB"
_SEPARATORS: Final = {",": "commas", ";": "semicolons", "\t": "tabs"}
# Kind of file to the command that makes JSONL of it: here one line of text is one example.
_TO_JSONL: Final = {
    ".txt": "python3 -c 'import json, sys; [print(json.dumps(dict(text=line.strip()))) for line in sys.stdin "
    "if line.strip()]' < {source} > {target}",
    ".parquet": "pip install pandas pyarrow && python3 -c 'import pandas, sys; "
    "pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], "
    'orient="records", lines=True)\' {source} {target}',
}

_ARRAY_TO_LINES: Final = (
    "python3 -c 'import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]' < FILE > FILE.jsonl"
)


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file.

    Attributes:
        place: ``file:line``, as every error about it begins.
        fields: column or key to value.
    """

    place: str
    fields: dict[str, Any]


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


def read_records(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[Record]:
    """The records of a ``.csv`` or ``.tsv`` file, or of JSONL under any other name; blank lines are passed over.

    ``.txt`` and ``.parquet`` files are refused, with the command that makes JSONL of them.

    A ``.csv`` may have semicolons between its fields, as spreadsheets of many countries write them: its header tells.

    Args:
        columns: our field to the file's column, from ``parse_columns``.

    Raises ``DataError`` with file and line for whatever cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix in _TO_JSONL:
        source, target = (shlex.quote(str(each)) for each in (path, path.with_suffix(".jsonl")))
        command = _TO_JSONL[suffix].format(source=source, target=target)
        raise DataError(f"{path}: no {suffix} files; make JSONL of it first: {command}")
    if suffix == ".csv":
        records = _csv_records(path, ",;")
    elif suffix == ".tsv":
        records = _csv_records(path, "\t")
    else:
        records = _jsonl_records(path)
    if columns is None:
        yield from records
        return
    for record in records:
        for theirs in columns.values():
            if theirs not in record.fields:
                raise DataError(f"{record.place}: no column {theirs!r}; there are {_listed(record.fields)}")
        yield Record(record.place, {ours: record.fields[theirs] for ours, theirs in columns.items()})


def _jsonl_records(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        hint = f"; make lines of the array first: {_ARRAY_TO_LINES}" if number == 1 and line.lstrip()[0] == "[" else ""
        try:
            value = msgspec.json.decode(line)
        except (msgspec.MsgspecError, RecursionError) as error:
            text = f"not valid JSON ({error}); each line must be one whole JSON object"
            raise DataError(f"{place}: {text}{hint}") from None
        if not isinstance(value, dict):
            raise DataError(f"{place}: a JSON {_kind(value)}; each line must be one JSON object{hint}")
        yield Record(place, value)


def _csv_records(path: Path, delimiters: str) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    # A quoted field may span lines: a record's place is where it starts.
    start, length = 1, 0

    def lines_of_a_record() -> Iterator[str]:
        nonlocal length
        for _, line in _lines(path):
            length += len(line)
            if length > MAX_RECORD_BYTES:
                raise DataError(f"{path}:{start}: a record of {_TOO_LONG}; is a quote opened there and never closed?")
            yield line

    header: list[str] | None = None
    lines = lines_of_a_record()
    first = next(lines, "")
    try:
        delimiter = _find_delimiter(first, delimiters)
        reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
        for record in reader:
            place, start, length = f"{path}:{start}", reader.line_num + 1, 0
            if not any(field.strip() for field in record):
                continue
            if header is None:
                header = [name.strip() for name in record]
                _check_header(place, header)
                continue
            if len(record) != len(header):
                raise DataError(
                    f"{place}: {len(record)} fields, the header has {len(header)}; "
                    f"quote fields that have {_SEPARATORS[delimiter]}"
                )
            yield Record(place, dict(zip(header, record, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{start}: not valid CSV ({error})") from None


def _find_delimiter(header: str, delimiters: str) -> str:
    """The first of ``delimiters`` that ``header`` has outside quotes, or the very first."""
    fields = {delimiter: len(next(csv.reader([header], delimiter=delimiter), [])) for delimiter in delimiters}
    return next((delimiter for delimiter in delimiters if fields[delimiter] > 1), delimiters[0])


def _check_header(place: str, header: list[str]) -> None:
    if len(set(header)) != len(header):
        raise DataError(f"{place}: the header names a column twice")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number, from 1, and text with its line end. Raises ``DataError``."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_RECORD_BYTES + 1), b""), 1):
                if len(line) > MAX_RECORD_BYTES:
                    raise DataError(f"{path}:{number}: a line of {_TOO_LONG}; write one example a line, and cut it")
                raw = line.removeprefix(_BOM) if number == 1 else line
                try:
                    yield number, raw.decode()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line); convert the file to UTF-8"
                    ) from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a directory; give one file") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise DataError("the data path is too long to be one") from None
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, fields)) or "none"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}.get(type(value), "value")
