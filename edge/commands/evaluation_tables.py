"""What ``dlora-edge evaluate`` prints for people."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

_SHOWN: Final = 400  # characters of a question or an answer


def show_models(result: dict[str, Any]) -> None:
    """A row a model; where there are several, how much the first is above each other."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console(highlight=False)
    columns = (Column(name, justify="right", no_wrap=True) for name in ("loss", "tokens right", "wholly right"))
    table = Table("", *columns, box=None, padding=(0, 2, 0, 0))
    has_answers = "right" in result
    if has_answers:
        table.add_column(f"answers right\n({result['answers']})", justify="right", no_wrap=True)
    rows = [result, *result.get("against", [])]
    for row in rows:
        cells = [escape(row["name"]), _loss(row["loss"], row["loss_interval"])]
        names = ["token_accuracy", "exact_match", *(["right"] if has_answers else [])]
        cells += [_share(row[name], row[f"{name}_interval"]) for name in names]
        table.add_row(*cells)
    for other in result.get("against", []):
        found = other["difference"]
        cells = [f"above {escape(other['name'])}", _loss(found["loss"]["mean"], found["loss"]["interval"], sign="+")]
        cells += [_points(found["token_accuracy"]), ""]
        cells += [_points(found["right"])] if has_answers else []
        table.add_row(*cells, style="dim")
    console.print(table)
    asked = f", {result['questions']:,} questions" if has_answers else ""
    console.print(f"{result['examples']:,} examples, {result['tokens']:,} labelled tokens{asked}; 95 % intervals")


def show_answers(rows: Sequence[dict[str, Any]]) -> None:
    """Questions with the answers of each model, one below the other."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for row in rows:
        console.print()
        console.print(Text(row["place"], style="bold"))
        width = max(len("reference"), *(len(each["name"]) for each in row["answers"]))
        console.print(Text(_short(row["asked"]), style="dim"))
        console.print(Text(f"{'reference':<{width}}    {_short(row['reference'])}"))
        for each in row["answers"]:
            mark, colour = ("✓", "green") if each["right"] else ("✗", "red")
            console.print(Text(f"{each['name']:<{width}}  {mark} {_short(each['answer'])}", style=colour))
    sys.stdout.flush()


def _loss(mean: float, ends: Sequence[float], sign: str = "") -> str:
    return f"{mean:{sign}.4f} ({ends[0]:{sign}.4f} to {ends[1]:{sign}.4f})"


def _share(mean: float, ends: Sequence[float]) -> str:
    return f"{mean:.1%} ({ends[0]:.1%} to {ends[1]:.1%})"


def _points(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['mean']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"… {line[-_SHOWN:]}"
