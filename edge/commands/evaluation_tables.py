"""What ``dlora-edge evaluate`` prints for people."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from dlora.protocol.text import visible

_SHOWN: Final = 400  # characters of a question or an answer
_MEASURES: Final[tuple[tuple[str, str, Callable[[float], str]], ...]] = (
    ("loss", "loss of a token", "{:.4f}".format),
    ("token_accuracy", "tokens predicted right", "{:.1%}".format),
    ("exact_match", "examples predicted right, token by token", "{:.1%}".format),
    ("right", "answers right", "{:.1%}".format),
)


def show_models(result: dict[str, Any]) -> None:
    """Of each measure, what was found of every model, and how much the first is above each other."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    others = result.get("against", [])
    width = max(len(row["name"]) for row in (result, *others))
    for measure, title, form in _MEASURES:
        if measure not in result:
            continue
        console.print(f"[bold]{title}[/]" + (f" ({result['answers']})" if measure == "right" else ""))
        for row in (result, *others):
            line = f"  {row['name']:<{width}}  {form(row[measure])}  ({_ends(row[f'{measure}_interval'], form)})"
            if difference := row.get("difference", {}).get(measure):
                line += f"   {result['name']} is {_above(difference, form)}"
            console.print(visible(line), markup=False)
    asked = f", {result['questions']:,} questions" if "right" in result else ""
    console.print(f"{result['examples']:,} examples, {result['tokens']:,} labelled tokens{asked}; 95 % intervals")


def show_answers(rows: Sequence[dict[str, Any]]) -> None:
    """Questions with the answers of each model, one below the other."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for row in rows:
        console.print()
        console.print(Text(_short(row["place"]), style="bold"))
        width = max(len("reference"), *(len(each["name"]) for each in row["answers"]))
        console.print(Text(_short(row["asked"]), style="dim"))
        console.print(Text(f"{'reference':<{width}}    {_short(row['reference'])}"))
        for each in row["answers"]:
            mark, colour = ("✓", "green") if each["right"] else ("✗", "red")
            console.print(Text(f"{each['name']:<{width}}  {mark} {_short(each['answer'])}", style=colour))
    sys.stdout.flush()


def _above(difference: dict[str, Any], form: Callable[[float], str]) -> str:
    mean, (low, high) = difference["mean"], difference["interval"]
    if mean == low == high == 0:
        return "the same"
    if mean < 0:
        return f"{form(-mean)} lower ({_ends((-high, -low), form)})"
    return f"{form(mean)} higher ({_ends((low, high), form)})"


def _ends(ends: Sequence[float], form: Callable[[float], str]) -> str:
    return f"{form(ends[0])} to {form(ends[1])}"


def _short(text: str) -> str:
    line = visible(" ".join(text.split()))
    return line if len(line) <= _SHOWN else f"… {line[-_SHOWN:]}"
