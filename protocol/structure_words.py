"""What is wrong with data of a known structure, in our words in place of msgspec's."""

from __future__ import annotations

import re
from typing import Final

_KINDS: Final = {
    "int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "null": "nothing",
    "array": "a list", "object": "an object", "bytes": "bytes",
}  # fmt: skip
_PLACE: Final = re.compile(r" - at `(?:key in )?\$?\.?(.*?)`$", re.S)


def structure_words(error: Exception) -> str:
    """What ``error`` says, a ``msgspec.MsgspecError`` or another; one that is not known is as it is."""
    text = str(error)
    found = _PLACE.search(text)
    place, text = (found[1] or "it", text[: found.start()]) if found else ("it", text)
    if match := re.fullmatch(r"Expected `(.*?)`(?:, got `(.*?)`)?( .*)?", text, re.S):
        wanted, given, bound = match.groups(default="")
        bound = "" if "regex" in bound else bound
        is_not = f"is {_kinds(given)}, and" if given else "has a value that cannot be:"
        return f"{place} {is_not} {_kinds(wanted)}{bound} belongs there"
    if match := re.fullmatch(r"Object missing required field `(.*)`", text, re.S):
        return f"{_within(place)}{match[1]!r} is missing"
    if match := re.fullmatch(r"Object contains unknown field `(.*)`", text, re.S):
        return f"{_within(place)}{match[1]!r} is not known"
    if match := re.fullmatch(r"Invalid (?:enum )?value (.*)", text, re.S):
        return f"{place} is {match[1]}, which is not known"
    if text.startswith("JSON is malformed"):
        return f"it is no JSON: {text.partition(': ')[2]}"
    return "it is cut short" if text.startswith("Input data was truncated") else str(error)


def _kinds(names: str) -> str:
    words = [_KINDS.get(name.strip(), name.strip()) for name in names.split("|")]
    return " or ".join(words)


def _within(place: str) -> str:
    return "" if place == "it" else f"{place}: "
