"""Rows of a CSV file, whatever stands between its fields: its header tells."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final

from dlora.protocol.errors import DataError

from .lines import MAX_RECORD_BYTES, TOO_LONG, lines_of

_USUAL: Final = ",;\t|"
_WORDS: Final = {",": "commas", ";": "semicolons", "\t": "tabs"}


def csv_rows(path: Path, known: Collection[str], *, delimiters: str = _USUAL) -> Iterator[tuple[int, dict[str, Any]]]:
    """The line at which a row begins, from 1, and its fields by column. Raises ``DataError``.

    Args:
        known: columns that mean something here: a delimiter other than ``delimiters`` is taken for one where it makes
            such columns of the header.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    # A quoted field may span lines: a record's place is where it starts.
    start, length = 1, 0

    def lines_of_a_record() -> Iterator[str]:
        nonlocal length
        for _, line in lines_of(path):
            length += len(line)
            if length > MAX_RECORD_BYTES:
                raise DataError(f"{path}:{start}: a record of {TOO_LONG}; is a quote opened there and never closed?")
            yield line

    header: list[str] | None = None
    lines = lines_of_a_record()
    first = next(lines, "")
    try:
        delimiter = _find_delimiter(first, known, delimiters)
        reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
        for record in reader:
            place, start, length = start, reader.line_num + 1, 0
            if not any(field.strip() for field in record):
                continue
            if header is None:
                header = [name.strip() for name in record]
                if len(set(header)) != len(header):
                    raise DataError(f"{path}:{place}: the header names a column twice")
                continue
            if len(record) != len(header):
                raise DataError(
                    f"{path}:{place}: {len(record)} fields, the header has {len(header)}; "
                    f"quote fields that have {_WORDS.get(delimiter, repr(delimiter))}"
                )
            yield place, dict(zip(header, record, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{start}: not valid CSV ({error})") from None


def _find_delimiter(header: str, known: Collection[str], usual: str) -> str:
    """The first of ``usual`` that ``header`` has outside quotes, or any other that makes known columns of it, or a
    comma."""
    for delimiter in usual:
        if len(_split(header, delimiter)) > 1:
            return delimiter
    others = sorted({each for each in header.strip() if not each.isalnum() and each not in "_\"' \r\n" + usual})
    for delimiter in others:
        if len(found := _split(header, delimiter)) > 1 and any(name.strip() in known for name in found):
            return delimiter
    return usual[0]


def _split(header: str, delimiter: str) -> list[str]:
    return next(csv.reader([header], delimiter=delimiter), [])
