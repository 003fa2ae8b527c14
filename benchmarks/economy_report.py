"""``docs/log/benchmarks.md``, ``economy.json`` and the plots, of the runs that are finished."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bars import FILE, write_bars
from economy_data import SETS
from economy_plot import Series, plot
from economy_recipes import BASELINE, GRID, RECIPES, order
from economy_results import (
    BARS,
    Difference,
    Find,
    Rate,
    Result,
    accuracy_difference,
    find_result,
    is_not_worse,
    loss_difference,
    measure_bars,
)
from economy_runs import Finished, Plan, Point
from sections import DEFAULTS, TRUNK, section_of, with_section

from dlora.edge.files import write_atomically

RESULTS = "economy-results.json"
RATES: tuple[Rate, ...] = ("chosen", "default")

INTRO = """# Benchmarks: what a run costs, and what it is worth

    python benchmarks/economy.py              # hours, in pieces: what is finished is never made again
    python benchmarks/economy.py --quick      # a taste in minutes, kept apart
    python benchmarks/economy.py --report     # this page, of the runs that stand in economy-runs.jsonl

These commands write this page, [economy.json](benchmarks/economy.json) and the plots; each run is a line of
[economy-runs.jsonl](benchmarks/economy-runs.jsonl), and what they come to stands in
[economy-results.json](benchmarks/economy-results.json) as well.

**What is compared.** Recipes: what is trained, and how it crosses. Each trains a fresh adapter for SmolLM2-135M over
a real websocket; runs of two recipes with one seed see the same rows in the same order. The baseline is LoRA of rank 8
on q and v of all 30 blocks, fp16 on the wire. One epoch where a set's title says nothing else, 8 rows a step, AdamW
with the command's weight decay (1 for bottlenecks, 0 for LoRA), 3 % warm-up, then linear to 0. Three seeds where a bar
rests on a recipe, one elsewhere.

**Rates.** Every recipe but the default chooses its learning rate by the loss on validation rows, which are neither
trained nor tested on, with seed 0 and from one grid: {grid}. It begins at the rate of a user who gives none and goes
outward while that gains something: the best has both its neighbours tried. Each table has the chosen rate and the one
without `--lr`: for LoRA 0.001, for the default the one that the command finds before the first step, the median of its
seeds' rates ([decision 0065](decisions/0065-a-first-rate-from-the-model-and-the-data.md)). The default chooses none
here: its two lines are the same runs, once beside LoRA at its best rate and once beside LoRA at 0.001;
[below](#without-a-rate-on-other-models) is what a grid gives, where it was run. LoRA is trained without gains here, as
other tools train it. Recipes that are called *without gains*, and those of blocks on the device, were run before there
were any ([0063](decisions/0063-gains-are-measured-at-export.md)), and their rates without `--lr` are those of that
time. Every run is tested, whatever its rate; that chooses nothing. What choosing costs is not counted. The file of runs
also has some of recipes that are no more, which count nowhere. `ffa` is not among the recipes: its deltas are as wide
as LoRA's.

**What is counted.** *Loss* is the mean a label, *right* the share of rows whose every label is the likeliest token,
which is what greedy decoding writes; of dialogue it says nothing. Tested on are all test rows of the intents, the
demo's 96 held-out answers, and 500 rows of the others. *Bytes a token* are all frames both ways, from the greeting to
the last step, over the tokens trained on: set-up, adapter state, tries for a rate, embeddings, the head's rows,
retries, reports; not evaluations, nor the 2 to 14 bytes that websockets add a frame. *Round trips* are the median of
the steps. *CPU* is the processor's time of the device's whole process, *time* the clock's, both without evaluations.

**Differences** are to the baseline with the rate that it chose, or without `--lr`, ours minus theirs, with 95 %
intervals: a bootstrap over rows, seeds pooled. They say what other test rows would change, not what other seeds would.
*Not worse* is a mean loss at most 0.02 above the baseline's and at most 1.5 points less right; with dialogue, a loss at
most 2.5 % above.

**Where.** Two shared cores of an AMD EPYC, loopback, 2 threads for the server and 2 for the device (the default: 1 and
1), beside other work and at low priority: times are rough. The server's base model is {dtype}.
"""


def write_report(finished: Finished, plan: Plan, docs: Path) -> dict[str, Any]:
    """Write all of it; returns the bars and what is missing. Plots of sets without a finished run stay as they are."""

    @cache
    def find(set_name: str, recipe: str, rate: Rate) -> Result | None:
        return find_result(finished, plan, set_name, recipe, rate)

    folder = docs / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    bars = measure_bars(find)
    write_bars(docs / FILE, bars, forget=BARS)  # of ours, those whose runs are not all there any more
    write_atomically(folder / RESULTS, (json.dumps(_results(find), indent=1) + "\n").encode())
    missing = list(_missing(finished, plan))
    lines = [INTRO.format(grid=", ".join(f"{rate:g}" for rate in GRID), dtype=plan.dtype)]
    lines += ["## Bars\n", "A bar holds where it does at the chosen rates and without `--lr`.\n"]
    lines += _bar_lines(find, bars)
    for set_name in SETS:
        section = list(_set_lines(find, set_name, folder))
        if section:
            lines += [f"## {_capitalized(SETS[set_name].title)}\n", *section]
    lines += ["## What is missing\n", *([f"- {each}" for each in missing] or ["Nothing."])]
    text = "\n".join(lines).rstrip() + "\n"
    page = docs / "benchmarks.md"
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    for title in (DEFAULTS, TRUNK):
        text = with_section(text, title, section_of(before, title))
    page.write_text(text, encoding="utf-8")
    return {"runs": len(finished), "bars": bars, "missing": missing}


def _results(find: Find) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """By set, recipe, and how the rate was chosen."""
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for set_name, recipe in order():
        for rate in RATES:
            if (result := find(set_name, recipe, rate)) is not None:
                found.setdefault(set_name, {}).setdefault(recipe, {})[rate] = {
                    "lr": result.rate,
                    "loss": round(result.loss, 4),
                    "validation_loss": round(result.validation_loss, 4),
                    "accuracy": round(result.accuracy, 4),
                    "bytes_per_token": round(result.bytes_per_token, 1),
                    "seeds": result.seeds,
                    "command": f"python benchmarks/economy.py --only {set_name}/{recipe}",
                }
    return found


def _missing(finished: Finished, plan: Plan) -> Iterator[str]:
    """A line for each recipe that is not finished on all its sets."""
    for recipe in RECIPES:
        sets = [set_name for set_name, name in order() if name == recipe]
        unfinished = [set_name for set_name in sets if plan.next(finished, set_name, recipe) is not None]
        if unfinished:
            yield f"{recipe}: not finished on {', '.join(unfinished)}"


# -- bars ------------------------------------------------------------------------------------------------


def _bar_lines(find: Find, bars: dict[str, Any]) -> Iterator[str]:
    if not bars:
        yield "No bar has all its runs yet.\n"
        return
    yield "| | bar | value | without `--lr` | holds |\n|---|---|---|---|---|"
    for name, entry in bars.items():
        plain = BARS[name].find(find, "default")
        sign = "≤" if BARS[name].most else "≥"
        yield (
            f"| {name}: {BARS[name].what} | {sign} {entry['bar']:.4g} | {entry['value']:.3g} | "
            f"{'' if plain is None else f'{plain[1]:.3g}'} | {'yes' if entry['holds'] else 'no: ' + entry['reason']} |"
        )
    yield ""


# -- one set ---------------------------------------------------------------------------------------------


def _set_lines(find: Find, set_name: str, folder: Path) -> Iterator[str]:
    names = [name for name in RECIPES if any(find(set_name, name, rate) for rate in RATES)]
    if not names:
        return
    drawn = [found for name in names if (found := find(set_name, name, "chosen")) is not None]
    if drawn:
        picture = folder / f"economy-{set_name}.svg"
        picture.write_text(_plot(set_name, drawn), encoding="utf-8")
        yield f"![Held-out loss against bytes: {SETS[set_name].title}](benchmarks/{picture.name})\n"
    yield (
        "| recipe | rate | validation loss | loss | right | loss, difference | right, difference in points | not worse "
        "| bytes a token | fewer | round trips a step | CPU, s | time, s | seeds |\n" + 14 * "|---" + "|"
    )
    for name in names:
        for rate in RATES:
            if (result := find(set_name, name, rate)) is not None:
                yield _row(result, find(set_name, BASELINE, rate), rate)
    yield ""
    yield from _same_quality_lines(set_name, drawn)


def _row(result: Result, baseline: Result | None, rate: Rate) -> str:
    """A line of the table; differences only where the baseline has some of its seeds."""
    shown = f"{result.rate:g}"
    if rate == "default":
        shown += ", without `--lr`"
    elif result.lr in (None, GRID[0], GRID[-1]):
        shown += ", found" if result.lr is None else ", at the grid's end"
    is_text = SETS[result.set_name].relative  # no greedy answer is the data's, word for word
    right = "" if is_text else f"{result.accuracy:.1%}"
    cells = [RECIPES[result.recipe].title, shown, f"{result.validation_loss:.4f}", f"{result.loss:.4f}", right]
    common = [] if baseline is None else [seed for seed in result.seeds if seed in baseline.seeds]
    if baseline is None or not common or result.recipe == BASELINE:
        cells += ["", "", "", f"{result.bytes_per_token:,.0f}", ""]
    else:
        ours, theirs = result.of_seeds(common), baseline.of_seeds(common)
        cells += [
            _interval(loss_difference(ours, theirs), 3),
            "" if is_text else _interval(accuracy_difference(ours, theirs), 1),
            "yes" if is_not_worse(ours, theirs) else "no",
            f"{result.bytes_per_token:,.0f}",
            f"{ours.fewer_bytes(theirs):.1f} %",
        ]
    cells += [
        f"{result.mean(lambda run: run.round_trips_per_step):.0f}",
        f"{result.mean(lambda run: run.device_cpu_s):.0f}",
        f"{result.mean(lambda run: run.wall_s):.0f}",
        ", ".join(map(str, result.seeds)),
    ]
    return f"| {' | '.join(cells)} |"


def _interval(found: Difference | None, digits: int) -> str:
    return "" if found is None else f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def _same_quality_lines(set_name: str, drawn: Sequence[Result]) -> Iterator[str]:
    """What it takes to come to the quality at which the baseline ends, within the set's bar."""
    baseline = next((result for result in drawn if result.recipe == BASELINE), None)
    if baseline is None:
        return
    of_set, end = SETS[set_name], _curve(baseline)[-1].loss
    target = end * (1 + of_set.loss_bar) if of_set.relative else end + of_set.loss_bar
    rows = []
    for result in drawn:
        point = next((point for point in _curve(result) if point.loss <= target), None)
        if point is None:
            cells = ["not reached", "", "", "", ""]
        else:
            cells = [f"{point.step}", f"{point.bytes / 1e6:,.1f}", f"{point.round_trips:,}"]
            cells += [f"{point.cpu_s:.0f}", f"{point.wall_s:.0f}"]
        rows.append(f"| {RECIPES[result.recipe].title} | {' | '.join(cells)} |")
    yield (
        "To the same quality, at the chosen rates: the first of a run's five evaluations whose loss on at most 100 "
        f"validation rows is {target:.4f} or less, the baseline's last and the bar.\n"
    )
    yield "| recipe | steps | MB | round trips | CPU, s | time, s |\n|---|---|---|---|---|---|"
    yield from rows
    yield ""


def _curve(result: Result) -> list[Point]:
    """A result's evaluations, means over its seeds."""
    means = []
    for points in zip(*(run.curve for run in result.runs), strict=True):
        mean = {
            name: statistics.mean(getattr(point, name) for point in points)
            for name in ("bytes", "loss", "round_trips", "cpu_s", "wall_s")
        }
        counts = {name: round(mean[name]) for name in ("bytes", "round_trips")}
        means.append(Point(step=points[0].step, **mean | counts))
    return means


def _plot(set_name: str, drawn: Sequence[Result]) -> str:
    series = []
    for result in drawn:
        points = tuple((float(point.bytes), point.loss) for point in _curve(result))
        series.append(Series(f"{RECIPES[result.recipe].title}, lr {result.rate:g}", points))
    title = f"{_capitalized(SETS[set_name].title)}: loss against bytes"
    return plot(title, series, "mean loss a label, validation rows")


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
