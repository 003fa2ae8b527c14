"""Text of others, made fit to be shown."""

from __future__ import annotations


def first_line(error: BaseException, letters: int = 200) -> str:
    """What an exception of a library says first, as one line; where it says nothing, what it is."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[0], letters)


def one_line(text: str, letters: int | None = None) -> str:
    """``text``, or its first ``letters``, as one line of printable letters: some of it may be a peer's words, and must
    neither steer a terminal nor write a line of its own into a log."""
    return "".join(letter for letter in " ".join(text[:letters].split()) if letter.isprintable())
