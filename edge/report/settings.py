"""A run's settings as a page has them: no seed, of files their names only, of secrets' files that there are some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlora.edge.settings import Field, Settings, fields_of


def shown_settings(settings: Settings) -> dict[str, str]:
    """Every setting that is not left out or off, by what a user writes for it."""
    found = {}
    for field in fields_of():
        value = field.value_in(settings)
        if value is None or value is False or value in ("", ()) or (field.depth == "rare" and value == field.default):
            continue
        found[field.words] = _shown(field, value)
    return found


def _shown(field: Field, value: Any) -> str:
    if field.key == "seed":
        return "chosen"  # who has seen the frames and knows it knows more: it is not for showing around
    if field.is_secret:
        return "given"
    if isinstance(value, Path):
        return value.name
    if isinstance(value, bool):
        return "on"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(value) if isinstance(value, tuple) else str(value)
