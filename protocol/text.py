"""Makes text of peers and libraries safe to print, and names safe to tell."""

from __future__ import annotations

from pathlib import PurePath


def first_line(error: BaseException, max_characters: int = 200) -> str:
    """What an exception of a library says first, as one line; where it says nothing, what it is."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[0], max_characters)


def one_line(text: str, max_characters: int | None = None) -> str:
    """``text``, or its first ``max_characters``, as one line of printable characters: some may be a peer's, and must
    neither steer a terminal nor write a line of its own into a log."""
    return "".join(each for each in " ".join(text[:max_characters].split()) if each.isprintable())


def is_hub_id(name: str) -> bool:
    """Whether a base model's name has the form of a hub's, ``org/name``."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(("/", ".gguf"))


def name_without_path(name: str) -> str:
    """A base model's name for who should not learn where its files are: the last part of a path, else as it is."""
    return name if is_hub_id(name) else PurePath(name).name or name
