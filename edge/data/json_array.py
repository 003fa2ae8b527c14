"""Rows of a JSON file that is one array of objects, whatever its size."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dlora.protocol.errors import DataError

from .lines import MAX_RECORD_BYTES, TOO_LONG, file_errors, json_object, not_utf8

_CHUNK_BYTES: Final = 1 << 20
_BLANKS: Final = " \t\r\n"
_find_end: Final = json.JSONDecoder().raw_decode


def array_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The line at which an object begins, from 1, and the object. Raises ``DataError``."""
    text = _Text(path)
    text.skip_blanks()
    text.take("[", "an array")
    if text.skip_blanks() == "]":
        return
    while True:
        line, element = text.line, text.value()
        yield line, json_object(element, f"{path}:{line}", "each element of the array must be one JSON object")
        if text.skip_blanks() == "]":
            break
        text.take(",", "a comma, or the end of the array,")
        text.skip_blanks()
    text.take("]", "the end of the array")
    if text.skip_blanks():
        raise DataError(f"{path}:{text.line}: something follows the array; write one object a line, or one array")


class _Text:
    """A file's text, read as it is needed.

    Attributes:
        line: at which the text that comes next begins.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks = self._read()
        self._text, self._position = "", 0
        self.line = 1

    def skip_blanks(self) -> str:
        """The next character that is no blank; none at the end."""
        while True:
            while self._position < len(self._text):
                character = self._text[self._position]
                if character not in _BLANKS:
                    return character
                self._go_to(self._position + 1)
            if not self._more():
                return ""

    def take(self, character: str, what: str) -> None:
        """Pass over a character that has to be there."""
        if not self._text.startswith(character, self._position):
            found = "the file ends" if self._position == len(self._text) else "there is something else"
            raise DataError(f"{self._path}:{self.line}: not valid JSON: {what} belongs here, and {found}")
        self._go_to(self._position + 1)

    def value(self) -> str:
        """The next JSON value, as text."""
        while True:
            try:
                _, end = _find_end(self._text, self._position)
            except (json.JSONDecodeError, RecursionError) as error:
                if len(self._text) - self._position > MAX_RECORD_BYTES:
                    raise DataError(f"{self._path}:{self.line}: an element of {TOO_LONG}; cut it") from None
                if not self._more():
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else "lists within lists"
                    line = self.line
                    if isinstance(error, json.JSONDecodeError):
                        line += self._text.count("\n", self._position, error.pos)
                    raise DataError(f"{self._path}:{line}: not valid JSON ({reason})") from None
            else:
                found = self._text[self._position : end]
                self._go_to(end)
                return found

    def _go_to(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        self._position = position

    def _more(self) -> bool:
        chunk = next(self._chunks, "")
        self._text, self._position = self._text[self._position :] + chunk, 0
        return bool(chunk)

    def _read(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        line = 1  # of what is read next
        with file_errors(self._path), self._path.open("rb") as file:
            for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""):
                waiting = decoder.getstate()[0]
                try:
                    text = decoder.decode(chunk)
                except UnicodeDecodeError as error:
                    before = (waiting + chunk)[: error.start]
                    byte = error.start - (before.rfind(b"\n") + 1) + 1
                    raise not_utf8(self._path, line + before.count(b"\n"), byte) from None
                line += text.count("\n")
                if text:
                    yield text
            if decoder.getstate()[0]:
                raise DataError(f"{self._path}:{line}: not UTF-8 (it ends within a character); convert it to UTF-8")
