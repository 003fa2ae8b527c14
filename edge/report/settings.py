"""A run's settings as a page has them: no seed, of files their names only, of secrets' files that there are some."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, Final

import msgspec

from dlora.edge.run.run_file import RunSettings

_PATHS: Final = ("bundle", "data", "out", "eval_data", "init_adapter", "ca", "client_cert")
_SECRETS: Final = ("cache_key_file", "token_file", "client_key")


def shown_settings(settings: RunSettings) -> dict[str, str]:
    """Every setting that is not left out or off, by the name of its option."""
    found = {}
    for name, value in msgspec.structs.asdict(settings).items():
        if value is None or value is False or value == "" or value == []:
            continue
        found[f"--{name.replace('_', '-')}"] = _shown(name, value)
    return found


def _shown(name: str, value: Any) -> str:
    if name == "seed":
        return "chosen"  # who has seen the frames and knows it knows more: it is not for showing around
    if name in _SECRETS:
        return "given"
    if name in _PATHS:
        return PurePath(value).name
    if isinstance(value, bool):
        return "on"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(value) if isinstance(value, list) else str(value)
