"""Sections of a page that several benchmarks write: each from its line ``## TITLE`` to the next such line."""

from __future__ import annotations

from typing import Final

TRUNK: Final = "Blocks on the device"
"""Of an experiment that is finished, on the page of ``economy.py``, which keeps it."""
DEFAULTS: Final = "Without a rate, on other models"
"""What ``defaults.py`` writes into it."""


def section_of(page: str, title: str) -> str:
    """The section of this title, its heading included; empty where there is none."""
    return "".join(part for part in _parts(page) if part.startswith(f"## {title}\n"))


def with_section(page: str, title: str, section: str) -> str:
    """The page with this section in the place of the one of its title, or at the end; an empty one: without it.

    Sections stand apart by an empty line.
    """
    parts, heading = _parts(page), f"## {title}\n"
    if not any(part.startswith(heading) for part in parts):
        parts.append(heading)
    kept = [section if part.startswith(heading) else part for part in parts]
    return "\n\n".join(part.strip("\n") for part in kept if part.strip()) + "\n"


def _parts(page: str) -> list[str]:
    """What stands before the first section, and the sections."""
    parts = [""]
    for line in page.splitlines(keepends=True):
        if line.startswith("## "):
            parts.append("")
        parts[-1] += line
    return parts
