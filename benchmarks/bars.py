"""Bars: numbers that benchmarks have to reach. Each is an entry of a file in ``docs/log/benchmarks``, reached or
not."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from dlora.edge.files import make_directory, write_atomically

FILE: Final = Path("benchmarks") / "economy.json"  # in docs

Entry = dict[str, Any]


def at_most(bar: float, value: float, command: str) -> Entry:
    """The entry of a number that may be ``bar`` at most; ``command`` is what finds it. NaN is above every bar."""
    holds = value <= bar
    entry: Entry = {"bar": _rounded(bar), "value": _rounded(value), "holds": holds, "command": command}
    return entry if holds else {**entry, "reason": f"{value:.4g} where at most {bar:.4g} is wanted"}


def at_least(bar: float, value: float, command: str) -> Entry:
    """The entry of a number that must be ``bar`` at the least, likewise. NaN is below every bar."""
    holds = value >= bar
    entry: Entry = {"bar": _rounded(bar), "value": _rounded(value), "holds": holds, "command": command}
    return entry if holds else {**entry, "reason": f"{value:.4g} where at least {bar:.4g} is wanted"}


def write_bars(path: Path, bars: Mapping[str, Mapping[str, Any]], *, forget: Collection[str] = ()) -> dict[str, Any]:
    """Put ``bars`` into the file, by name; the entries of others stay, but for those that ``forget`` names. Gives all
    that the file has then.

    Raises ``StorageError``, and leaves the old file as it was.
    """
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    entries = {name: entry for name, entry in before.items() if name not in forget} | dict(bars)
    text = json.dumps(dict(sorted(entries.items())), indent=1, ensure_ascii=False) + "\n"
    make_directory(path.parent)
    write_atomically(path, text.encode())
    return entries


def _rounded(number: float) -> float:
    """Four digits that count: some bars are far below 1."""
    return float(f"{number:.4g}")
