"""Write docs/reference: what the code says of itself, as pages.

python .ci/reference.py [PAGE]    # a page by itself is printed
"""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Final

import msgspec

from dlora.edge.settings import VARIABLE, Field, Settings, fields_of, wanted

PLACE: Final = Path(__file__).resolve().parents[1] / "docs" / "reference"
_NOTE: Final = "<!-- Written by `make reference`; change the code that it is made of. -->"


def settings_page(settings: type[msgspec.Struct] = Settings) -> str:
    """Every setting of a run, section by section."""
    lines = [
        "# Settings of a run",
        "",
        _NOTE,
        "",
        "Each is an option of `dlora-edge train`, a key of its section in a file for `--config` (`--write-config` "
        "makes one), a key of `run.json`, and a keyword of `Settings.of` in Python.",
        f"The environment has it as `{VARIABLE}` and the option's name in capitals, `{VARIABLE}RANK`; for one "
        f"without an option section and key, `{VARIABLE}OPTIMIZER_BETA1`.",
        "The last that says something counts: the default, the file, the environment, `--set`, the option.",
        "`plan`, `resume` and `evaluate` take those that they need.",
    ]
    for section, fields in groupby(fields_of(settings), key=lambda field: field.section):
        rows = list(fields)
        lines += ["", f"## {rows[0].panel}", "", f"Section `[{section}]`.", ""]
        lines += ["| option | key | takes | default | what it is |", "|---|---|---|---|---|", *map(_row, rows)]
    return "\n".join(lines) + "\n"


def _row(field: Field) -> str:
    cells = (f"`{field.words}`", f"`{field.key}`", _takes(field), _default(field), field.help)
    return "| " + " | ".join(re.sub(r"([|<])", r"\\\1", cell) for cell in cells) + " |"


def _takes(field: Field) -> str:
    said = wanted(field)
    return "text" if said == "another value" else said.removeprefix("one of: ")


def _default(field: Field) -> str:
    if field.default is None or field.default in ("", ()):
        return ""
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default).lower()


PAGES: Final = {"settings.md": settings_page}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(PAGES[name]())
    if sys.argv[1:]:
        sys.exit()
    PLACE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (PLACE / name).write_text(page())
