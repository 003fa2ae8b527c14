"""A text or Markdown file as one document, read in parts that end with a line, so that its size does not matter."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Final, NamedTuple

from .lines import lines_of

_PART_CHARACTERS: Final = 1 << 16
_LONGEST_PARAGRAPH: Final = 1 << 17  # characters after which a part ends with any line


class TextPart(NamedTuple):
    """What a part of a document is of it: whether it has its first word, and its last."""

    begins: bool
    ends: bool


def text_parts(path: Path) -> Iterator[tuple[int, str, TextPart]]:
    """The parts of a document, which together are its text, each with the line at which it begins; none of a blank one.

    A part ends with an empty line, where one comes soon, so that tokens of two parts are those of the whole text.
    Lines end with a newline, whatever the file has. Raises ``DataError``.
    """
    is_first = True
    for part, following in pairwise(chain(_long_parts(path), [None])):
        assert part is not None
        line, text = part
        ends = following is None
        if not (is_first and ends) or text.strip():
            yield line, text, TextPart(begins=is_first, ends=ends)
        is_first = False


def _long_parts(path: Path) -> Iterator[tuple[int, str]]:
    begun, size, start = list[str](), 0, 1
    for number, line in lines_of(path):
        text = line[:-2] + "\n" if line.endswith("\r\n") else line
        begun.append(text)
        size += len(text)
        if size >= _LONGEST_PARAGRAPH or (size >= _PART_CHARACTERS and not text.strip()):
            yield start, "".join(begun)
            begun, size, start = [], 0, number + 1
    if begun:
        yield start, "".join(begun)
