"""Write docs/reference: what the code says of itself, as pages.

python .ci/reference.py [PAGE]    # a page by itself is printed
"""

from __future__ import annotations

import inspect
import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Final

import msgspec

from dlora.cloud.serving.metrics import METRICS
from dlora.edge.settings import VARIABLE, Field, Settings, fields_of, wanted
from dlora.edge.training.metrics import StepMetrics
from dlora.protocol import errors

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
        "makes one) and a key of `run.json`. In Python it is a keyword of `Settings.of`: the option's name with `_` "
        "for `-` (`kr_score`), or, without an option, section and key (`optimizer_beta1`).",
        f"The environment has it as `{VARIABLE}` and the option's name in capitals, `{VARIABLE}RANK`; for one "
        f"without an option section and key, `{VARIABLE}OPTIMIZER_BETA1`.",
        "The last that says something counts: the default, the file, the environment, `--set`, the option.",
        "`plan` takes all of them, `resume`, `evaluate` and the others some.",
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


def exit_codes_page() -> str:
    """Every exit code, of the errors that have it."""
    lines = [
        "# Exit codes",
        "",
        _NOTE,
        "",
        "A command that fails prints `error: ` and one line that says what to do; for an option that cannot be, how it "
        "is used. The codes never change their meaning.",
        "",
        "| code | means | in Python | again? |",
        "|---|---|---|---|",
        "| 0 | done | | |",
    ]
    for error in (errors.DloraError, *errors.DloraError.__subclasses__()):
        means = inspect.getdoc(error).partition("\n")[0].removesuffix(".").replace("``", "`")  # type: ignore[union-attr]
        lines.append(f"| {error.exit_code} | {means} | `{error.__name__}` | {error.again} |")
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """Every number of a line of ``metrics.jsonl``."""
    lines = ["# Metrics of a step", "", _NOTE, ""]
    lines += ["Each line of `metrics.jsonl` is one training step, a JSON object.", ""]
    lines += ["| key | what it is |", "|---|---|"]
    attributes = inspect.getdoc(StepMetrics).partition("Attributes:\n")[2]  # type: ignore[union-attr]
    for entry in re.split(r"\n(?=    \S)", attributes):
        names, _, text = " ".join(entry.split()).partition(": ")
        keys = ", ".join(f"`{name}`" for name in names.split(", "))
        lines.append(f"| {keys} | {text.replace('``', '`')} |")
    return "\n".join(lines) + "\n"


def server_metrics_page() -> str:
    """Every metric of a server."""
    lines = ["# Metrics of a server", "", _NOTE, "", "[`--metrics`](../how-to/run-a-server.md#watching) shows them."]
    lines += ["", "| metric | label | what it is |", "|---|---|---|"]
    lines += [f"| `{each.name}` | {each.label} | {each.help} |" for each in METRICS]
    return "\n".join(lines) + "\n"


PAGES: Final = {
    "settings.md": settings_page,
    "exit-codes.md": exit_codes_page,
    "metrics.md": metrics_page,
    "server-metrics.md": server_metrics_page,
}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(PAGES[name]())
    if sys.argv[1:]:
        sys.exit()
    PLACE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (PLACE / name).write_text(page())
