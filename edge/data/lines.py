"""Lines of a text file, with their numbers, as text and as JSON; and words for whatever keeps them from being read."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from dlora.protocol.errors import DataError
from dlora.protocol.structure_words import structure_words

BOM: Final = b"\xef\xbb\xbf"
MAX_RECORD_BYTES: Final = 8 << 20  # more than any model reads at once; tokenizing takes up to 200 times as much
TOO_LONG: Final = f"more than {MAX_RECORD_BYTES >> 20} MiB"


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line number, from 1, and text with its line end. Raises ``DataError``."""
    with file_errors(path), path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_RECORD_BYTES + 1), b""), 1):
            if len(line) > MAX_RECORD_BYTES:
                raise DataError(f"{path}:{number}: a line of {TOO_LONG}; write one example a line, and cut it")
            raw = line.removeprefix(BOM) if number == 1 else line
            try:
                yield number, raw.decode()
            except UnicodeDecodeError as error:
                raise not_utf8(path, number, error.start + 1) from None


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line that is not blank. Raises ``DataError``."""
    for number, line in lines_of(path):
        if line.strip():
            yield number, json_object(line, f"{path}:{number}", "each line must be one whole JSON object")


def json_object(text: str, place: str, rule: str) -> dict[str, Any]:
    """What stands at ``place``. Raises ``DataError``, which ends with the ``rule``."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON ({structure_words(error)}); {rule}") from None
    except UnicodeEncodeError:  # half a character, written as an escape
        raise DataError(f"{place}: not valid JSON (it has half a character); {rule}") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: a JSON {json_kind(value)}; {rule}")
    return value


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """What the system says of a file that cannot be read, as ``DataError``."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise DataError("the data path is too long to be one") from None
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def not_utf8(path: Path, line: int, byte: int) -> DataError:
    """For a line that has a byte, counted from 1, which is no UTF-8."""
    return DataError(f"{path}:{line}: not UTF-8 (byte {byte} of the line); convert the file to UTF-8")


def json_kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None:
        return "null"
    return {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}.get(type(value), "object")
