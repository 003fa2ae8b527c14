"""How far the reading of a file has come, from the line that is read now."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_PLACE: Final = re.compile(r"(.+):(\d+)\Z")
_CHUNK_BYTES: Final = 1 << 20


class ReadingProgress:
    """Words for where a reader is.

    Args:
        now: seconds, of a clock that only goes forward.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._file = ""
        self._lines = 0
        self._first = (0.0, 0)  # when the file was first seen, and at which line

    def words(self, place: str) -> str:
        """``place``, and where it is a line of a file: of how many lines, and about how long the rest takes."""
        found = _PLACE.match(place.removeprefix("what follows "))
        if found is None:
            return place
        file, line = found[1], int(found[2])
        if file != self._file:
            self._file, self._lines, self._first = file, _count_lines(Path(file)), (self._now(), line)
        if self._lines <= 1 or line > self._lines:
            return place
        text = f"{file}: line {line:,} of {self._lines:,}, {line / self._lines:.0%}"
        done = line - self._first[1]
        if done <= 0:
            return text
        left = round((self._now() - self._first[0]) / done * (self._lines - line))
        return f"{text}, {left // 60}:{left % 60:02} left"


def _count_lines(path: Path) -> int:
    """Newlines of a file that can be read again; 0 for any other."""
    try:
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""))
    except OSError:
        return 0
