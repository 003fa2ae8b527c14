"""The tables of a page, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dlora.edge.run.run_file import DataDigest

from .numbers import count, loss, mb, seconds, share
from .plots import Plot, picked, role_name
from .run_data import RunData
from .time_split import names_of


class Best(str):
    """A cell that is the best of its row."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """What stands in a table.

    Attributes:
        rows: the first cell of each is its heading.
        has_numbers: whether the other columns have numbers, which stand on the right.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    has_numbers: bool = True


def values_table(plot: Plot) -> Table:
    """Some of the steps of a plot, as numbers; all of them are in the page's data."""
    places = picked(plot)
    rows = [(count(plot.steps[at]), *(_cell(each.values[at], plot.factor) for each in plot.series)) for at in places]
    head = (plot.x, *(each.label for each in plot.series))
    caption = f"{plot.title}, {plot.y}: {len(places)} of the {count(len(plot.steps))} steps that are plotted"
    return Table(caption, head, rows)


def traffic_table(run: RunData) -> Table:
    """Bytes by role, of all steps, and of setting up."""
    steps = run.steps

    def row(name: str, size: int) -> tuple[str, str, str, str]:
        return name, mb(size), share(size, steps.bytes), f"{size / max(1, steps.tokens):,.0f}"

    def rows(by_role: Counter[str], arrow: str) -> list[tuple[str, str, str, str]]:
        return [row(f"{role_name(role)}\N{NO-BREAK SPACE}{arrow}", size) for role, size in by_role.most_common()]

    return Table(
        "By what crossed (↑ from the device, ↓ to it)",
        ("role", "bytes", "share", "bytes a token"),
        [
            *rows(steps.up, "↑"),
            *rows(steps.down, "↓"),
            row("set-up, before the steps", steps.set_up_bytes),
            row("all", steps.bytes),
        ],
    )


def time_table(run: RunData) -> Table:
    """Seconds by what they were spent on, of all steps."""
    steps, names = run.steps, names_of(run.steps.time)
    rows = [
        (names[name], seconds(spent), share(spent, steps.step_s), seconds(spent / max(1, steps.count)))
        for name, spent in asdict(steps.time).items()
        if spent > 0
    ]
    whole = steps.step_s
    rows.append(("all", seconds(whole), share(whole, whole), seconds(whole / max(1, steps.count))))
    if steps.paused_s:
        rows.append(("paused, beside the steps", seconds(steps.paused_s), "", ""))
    return Table("All steps, by what their time was spent on", ("spent on", "time", "share", "a step"), rows)


def evaluations_table(run: RunData) -> Table:
    rows = [
        (count(each.step), loss(each.loss), f"{each.token_accuracy:.1%}", f"{each.exact_match:.1%}", count(each.tokens))
        for each in run.evaluations
    ]
    head = ("after steps", "loss", "tokens right", "examples right", "tokens")
    return Table("Held-out evaluations", head, rows)


def data_table(run: RunData) -> Table:
    """Counts and lengths of the data, and nothing of what they say."""
    sets = {"trained on": run.file.data, **({"held out": run.file.eval_data} if run.file.eval_data else {})}
    columns = [_data_column(data) for data in sets.values()]
    rows = [(name, *(f"{column[name]:,.6g}" for column in columns)) for name in columns[0]]
    return Table("What was read", ("what", *sets), rows)


def versions(run: RunData) -> dict[str, str]:
    """What ran, by name: the server's first."""
    device = {name: _version(value) for name, value in run.file.versions.items() if value is not None}
    server = {f"server: {name}": _version(value) for name, value in (run.file.server or {}).items()}
    return {**server, **device}


def _data_column(data: DataDigest) -> dict[str, float]:
    shortest, quarter, half, three_quarters, longest = data.lengths
    return {
        "examples": data.examples,
        "tokens": data.tokens,
        "labels among them": data.labelled,
        "examples that were cut": data.truncated,
        "examples that were left out": data.skipped,
        "tokens of the shortest example": shortest,
        "a quarter have at most": quarter,
        "half have at most": half,
        "three quarters have at most": three_quarters,
        "tokens of the longest example": longest,
    }


def _version(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(value: float | int | None, factor: float) -> str:
    if value is None:
        return "–"
    return f"{value * factor:,.4f}" if factor != 1 else f"{value:,.5g}"
