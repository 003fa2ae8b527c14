"""``docs/benchmarks/drift.json``, its bar in ``economy.json``, and the section of ``docs/benchmarks.md``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bars import FILE, write_bars
from drift_results import BAR, Gap, Range, gaps, loss_b, mean_loss, summary, to_json, verdict
from drift_runs import FIRST, VARIANTS, Finished, Plan, Run
from economy_recipes import DEFAULT, RECIPES
from sections import DRIFT, with_section

from dlora.edge.files import write_atomically

INTRO: Final = """\
    python benchmarks/drift.py                # hours, in pieces: what is finished is never made again
    python benchmarks/drift.py --quick        # a taste in minutes, kept apart
    python benchmarks/drift.py --report       # this section, of the runs that stand in drift-runs.jsonl

These commands write this section and [drift.json](benchmarks/drift.json); each run is a line of
[drift-runs.jsonl](benchmarks/drift-runs.jsonl).

**What is asked.** On a task that drifts, does an adaptive score of Kill and Revive beat `random` and `static` with the
same budget? Task A is Banking77 with ten intents, task B the same with ten others. Each seed trains
{title} in 8 blocks, all active, rate {rate:g}, one epoch on A, once; from its adapter
each variant trains one epoch on B, with the same recipe, rate, rows and order, and without weight decay, as the
command has it. *Given to the server*: what a unit knows when it is not active stays in effect and crosses no more
(`--kr-on-kill give_to_server`); *bypassed*: it is lost.
No warm-up, no ramp; kills each {ticks.kill_every} steps, revivals each {ticks.revive_every}, {ticks.revive_share:.0%}
of the active units on trial, for {ticks.probation} steps. They were set without looking at losses, and changed once:
with revivals each 10 steps one of the two seats is on trial nearly all the time.
`static` is what it is by default; another choice of two blocks stands beside it, and is no rival.

**What counts.** The loss on B's test rows. A score beats its rivals if the median over three seeds of its loss above
the better one's, seed by seed, is below 0 by more than the spread: the larger of their two ranges over the seeds. The
score that the bar judges is the one with the least loss on B's validation rows. Medians, and from least to most in
brackets; *given* is the traffic of giving what killed units know; CPU and time as above.
"""

COLUMNS: Final[dict[str, tuple[str, float, str]]] = {
    "loss_b": ("loss on B", 1, ".4f"),
    "right_b": ("right on B, %", 100, ".1f"),
    "loss_a": ("loss on A", 1, ".4f"),
    "right_a": ("right on A, %", 100, ".1f"),
    "mean_loss": ("mean loss", 1, ".4f"),
    "bytes_per_token": ("bytes a token", 1, ",.0f"),
    "given_bytes": ("given, kB", 1e-3, ",.0f"),
    "round_trips_per_step": ("round trips a step", 1, ".0f"),
    "device_cpu_s": ("CPU, s", 1, ".0f"),
    "wall_s": ("time, s", 1, ".0f"),
    "kills": ("kills", 1, ".0f"),
    "revivals": ("revivals", 1, ".0f"),
}
"""Of the table: heading, factor and format of each measure."""


def write_report(finished: Finished, plan: Plan, docs: Path) -> dict[str, Any]:
    """Write all of it; returns what ``drift.json`` has."""
    runs = {name: plan.find(finished, name) for name in (FIRST, *VARIANTS)}
    bar = verdict(runs)
    report: dict[str, Any] = {
        "model": plan.model,
        "dtype": plan.dtype,
        "ticks": plan.ticks._asdict(),
        "variants": {
            name: {"seeds": [run.settings.seed for run in found], **to_json(summary(found))}
            for name, found in runs.items()
            if found
        },
        "gaps_on_b": to_json(gaps(runs, loss_b)),
        "gaps_of_the_mean": to_json(gaps(runs, mean_loss)),
        "verdict": bar,
        "missing": list(_missing(finished, plan)),
    }
    folder = docs / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "drift.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    write_bars(docs / FILE, {} if bar is None else {BAR: bar}, forget=[BAR])
    page = docs / "benchmarks.md"
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    section = "\n".join(_lines(runs, plan, report))
    write_atomically(page, with_section(before, DRIFT, section).encode())
    return report


def _missing(finished: Finished, plan: Plan) -> Iterator[str]:
    for variant, seed in plan.order():
        if plan.settings(variant, seed).digest not in finished:
            yield f"{variant}, seed {seed}"


def _lines(runs: Mapping[str, Sequence[Run]], plan: Plan, report: dict[str, Any]) -> Iterator[str]:
    yield f"## {DRIFT}\n"
    recipe = RECIPES[DEFAULT]
    yield INTRO.format(ticks=plan.ticks, title=recipe.title, rate=recipe.default_lr)
    bar = report["verdict"]
    if bar is None:
        yield "**Answer.** Not all runs that it takes are there yet.\n"
    else:
        yield f"**Answer.** {'Yes' if bar['holds'] else 'No: ' + bar['reason']}.\n"
    yield f"| variant | {' | '.join(title for title, _, _ in COLUMNS.values())} | seeds |"
    yield "|---" * (len(COLUMNS) + 2) + "|"
    for name, found in runs.items():
        if found:
            title = "before: all 8 blocks, on A alone" if name == FIRST else VARIANTS[name].title
            yield f"| {title} | {' | '.join(_cells(summary(found)))} | {', '.join(_seeds(found))} |"
    yield ""
    yield from _gap_lines("B's test rows", gaps(runs, loss_b))
    yield from _gap_lines("the mean of both tasks", gaps(runs, mean_loss))
    if report["missing"]:
        yield f"Missing: {'; '.join(report['missing'])}.\n"


def _cells(measures: Mapping[str, Range]) -> Iterator[str]:
    for name, (_, factor, form) in COLUMNS.items():
        found = measures[name]
        shown = [f"{factor * value:{form}}" for value in (found.median, found.least, found.most)]
        yield shown[0] if shown[1] == shown[2] else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _seeds(found: Sequence[Run]) -> list[str]:
    return [str(run.settings.seed) for run in found]


def _gap_lines(where: str, found: Mapping[str, Gap]) -> Iterator[str]:
    if not found:
        return
    yield f"Loss above the better one of `static` and `random`, {where}:\n"
    yield "| score | by seed | median | their spread | beats them |\n|---|---|---|---|---|"
    for name, each in found.items():
        gaps_by_seed = ", ".join(f"{value:+.4f}" for value in each.by_seed.values())
        beats = {True: "yes", False: "no", None: "not all seeds yet"}[each.beats]
        yield f"| `{name}` | {gaps_by_seed} | {each.median:+.4f} | {each.spread:.4f} | {beats} |"
    yield ""
