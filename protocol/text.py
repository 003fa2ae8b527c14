"""Makes text of peers and libraries safe to print, and names safe to tell."""

from __future__ import annotations

import json
import re
from pathlib import PurePath
from typing import Any, Final

# What steers a terminal (all controls but tab and line feed), or shows text in another order than it has; and halves of
# characters, which cannot be printed.
_STEERING: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


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


def visible(text: str) -> str:
    """``text`` for a terminal: lines and tabs as they are, whatever would steer it as an escape (``\\x1b``).

    Each character is looked at alone, so a text may come in pieces.
    """
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def visible_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON that can be read, and is safe to print: the same characters as ``\\u001b``, which is the same
    JSON."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False, indent=indent))
