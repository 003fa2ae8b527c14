"""What the runs of ``trunk_quality.py`` come to: a section of docs/log/benchmarks.md, trunk-quality.json, and bars."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from bars import Entry, at_most, write_bars
from economy_data import SETS as ALL_SETS
from economy_recipes import BASELINE, DEFAULT
from economy_results import Difference, Result, accuracy_difference, find_result, loss_difference
from economy_runs import Plan, Run
from sections import TRUNK, with_section
from trunk_recipes import BLOCKS, CHANCE, COMPARED, MEMORY_FILE, RANKS, SETS, recipe_name

from dlora.edge.files import write_atomically

COMMAND: Final = "python benchmarks/trunk_quality.py"
LOSS_BAR: Final = 0.02
POINTS_BAR: Final = 1.5
LEARNT: Final = 0.05
"""How far above a guess the baseline must be for a set to tell recipes apart."""
NO_BLOCKS: Final = 30
"""Stands for "more than were tried", in the bars: all blocks of the model."""

INTRO: Final = f"""## {TRUNK}

    {COMMAND}            # hours, in pieces: what is finished is never made again
    {COMMAND} --report   # this section, of the runs that stand in trunk-runs.jsonl and economy-runs.jsonl

LoRA on all linear modules of the last k of 30 blocks, which run on the device (`--device-blocks k`, in fp16), against
the baseline of this page, LoRA of rank 8 on q and v of all blocks, and the command's default recipe. The same rows,
seeds and validation rows; differences to the baseline with 95 % intervals as above, the default at the rate that it
finds, the others at the best of the grid. *As good* is a mean loss at most {LOSS_BAR} above the baseline's and at most
{POINTS_BAR} points less right; on dialogue the loss alone. Bytes are those of the one time that the texts cross, over
the tokens of these runs, most of which pass over their data once: each further epoch costs none, where the others cost
the same again. Seconds are processor time of the device's process a step, of the default with its set-up and its search
for a rate; memory is its peak at 256 tokens a step (`python benchmarks/trunk.py --only memory`).
"""
CHOICE: Final = """### What to choose when

Means over the seeds and sets above. In `split` the server is asked at every step; with blocks on the device it is asked
once for each text, and the run then needs none.
"""

BARS: Final = """### The bars

[trunk.json](benchmarks/trunk.json) has what was found for each, whether it holds, and the command that finds it.

| name | bar | of what |
|---|---|---|
| `step_of_torch` | ≤ 1.3 | a step, four blocks on the device, over torch's with these in one process; one thread each |
| `split_step` | ≥ 5 | a step of `split` with q and v active in all blocks, over that of the device |
| `peak_rss_fp16`, `_int8` | ≤ 300, 250 | MB of the device's process, four blocks, 256 tokens a step |
| `traffic_fp16`, `_int8` | ≥ 0.99, 0.995 | share of the bytes of all-active q and v that three epochs save |
| `bytes_after_fp16`, `_int8` | 0 | bytes that cross once the trunk cache is full |
| `peft_fp32`, `_fp16` | ≤ 1e-4, 2e-3 | between PEFT's loss with the saved adapter and the device's |
| `encode_of_one` | ≥ 0.95 | texts a second of sixteen devices that fill their caches together, over those of one |
| `encode_of_one_at_a_time` | ≥ 3 | the same, over one that asks for a text at a time, 20 ms of round trip |
| `blocks_as_good_b10` … | ≤ 12 | the fewest blocks of 30 that are as good as the baseline on that set |
"""


def write_report(runs: Mapping[str, Run], plan: Plan, docs: Path) -> dict[str, Any]:
    """Write all of it; what it says."""
    found: dict[str, Any] = {}
    telling: dict[str, Any] = {}  # of these, the sets that tell recipes apart
    file = docs / MEMORY_FILE
    memory: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    lines, bars = [INTRO], dict[str, Entry]()
    for set_name in SETS:
        results = {name: find_result(runs, plan, set_name, name, "chosen") for name in COMPARED}
        baseline = results[BASELINE]
        there = {name: result for name, result in results.items() if result is not None}
        if baseline is None or not any(name not in (BASELINE, DEFAULT) for name in there):
            continue
        title = ALL_SETS[set_name].title
        lines += [f"### {title[:1].upper()}{title[1:]}\n", *_table(there, baseline, memory), ""]
        found[set_name] = {name: _entry(result, baseline) for name, result in there.items()}
        if set_name in CHANCE and baseline.accuracy < CHANCE[set_name] + LEARNT:
            lines += [_nothing_learnt(set_name), ""]
            continue
        telling[set_name] = found[set_name]
        smallest = _smallest(found[set_name])
        if smallest is not None or all(recipe_name(k, r) in there for k in BLOCKS for r in RANKS):
            lines += [_verdict(smallest), ""]
            bars[f"blocks_as_good_{set_name}"] = at_most(
                BLOCKS[-1], NO_BLOCKS if smallest is None else smallest, f"{COMMAND} --only {set_name}"
            )
    lines += [CHOICE, *_choice(telling, memory), "", BARS]
    page = docs / "benchmarks.md"
    page.write_text(with_section(page.read_text(encoding="utf-8"), TRUNK, "\n".join(lines)), encoding="utf-8")
    write_bars(docs / "benchmarks" / "trunk.json", bars)
    write_atomically(docs / "benchmarks" / "trunk-quality.json", (json.dumps(telling, indent=1) + "\n").encode())
    return {"bars": bars, "sets": found}


def _entry(result: Result, baseline: Result) -> dict[str, Any]:
    seeds = [seed for seed in result.seeds if seed in baseline.seeds]
    ours, theirs = result.of_seeds(seeds), baseline.of_seeds(seeds)
    is_text = ALL_SETS[result.set_name].relative  # no greedy answer is the data's, word for word
    loss, points = loss_difference(ours, theirs), accuracy_difference(ours, theirs)
    assert loss is not None
    assert points is not None
    return {
        "lr": result.rate,
        "loss": round(result.loss, 4),
        "accuracy": None if is_text else round(result.accuracy, 4),
        "loss_difference": _numbers(loss),
        "points_difference": None if is_text else _numbers(points),
        "as_good": loss.mean <= LOSS_BAR and (is_text or points.mean >= -POINTS_BAR),
        "bytes_per_token": round(result.bytes_per_token, 1),
        "step_cpu_s": round(result.mean(lambda run: run.device_cpu_s / run.steps), 3),
        "seeds": result.seeds,
    }


def _numbers(found: Difference) -> list[float]:
    return [round(number, 4) for number in (found.mean, found.low, found.high)]


def _smallest(entries: Mapping[str, Mapping[str, Any]]) -> int | None:
    """The fewest blocks that are as good, of those whose three seeds are there."""
    for count in BLOCKS:
        for rank in RANKS:
            entry = entries.get(recipe_name(count, rank))
            if entry is not None and entry["as_good"] and len(entry["seeds"]) == 3:
                return count
    return None


def _nothing_learnt(set_name: str) -> str:
    return (
        f"A guess is right in {CHANCE[set_name]:.0%} of the rows, and nothing here is better than that: the model "
        "learns nothing of this set in so many steps, whatever is trained. So it tells no recipe from another, it "
        "counts nowhere below, and not all of its runs were made."
    )


def _verdict(smallest: int | None) -> str:
    if smallest is None:
        return f"None of these is as good as the baseline; up to {BLOCKS[-1]} blocks were tried."
    return f"The fewest blocks that are as good as the baseline: **{smallest}**."


def _table(results: Mapping[str, Result], baseline: Result, memory: Mapping[str, float]) -> Iterator[str]:
    yield (
        "| recipe | rate | loss | right | loss, difference | right, difference in points | as good | bytes a token "
        "| s a step | memory, MB | seeds |\n" + 11 * "|---" + "|"
    )
    for name, result in results.items():
        entry = _entry(result, baseline)
        differences = ["", "", ""]
        if name != BASELINE:
            differences = [
                _shown(entry["loss_difference"], 3),
                _shown(entry["points_difference"], 1),
                "yes" if entry["as_good"] else "no",
            ]
        right = "" if entry["accuracy"] is None else f"{entry['accuracy']:.1%}"
        cells = [COMPARED[name].title, f"{result.rate:g}", f"{result.loss:.4f}", right, *differences]
        cells += [f"{result.bytes_per_token:,.0f}", f"{entry['step_cpu_s']:.2f}", _of_memory(memory, name)]
        cells += [", ".join(map(str, result.seeds))]
        yield f"| {' | '.join(cells)} |"


def _choice(found: Mapping[str, Mapping[str, Any]], memory: Mapping[str, float]) -> Iterator[str]:
    """Every recipe in one row: on which sets it is as good, and what it takes."""
    columns = ["recipe", *(ALL_SETS[set_name].title.rpartition(",")[0] for set_name in found)]
    columns += ["bytes a token", "s a step", "memory, MB"]
    yield f"| {' | '.join(columns)} |\n" + len(columns) * "|---" + "|"
    for name, recipe in COMPARED.items():
        entries = [found[set_name].get(name) for set_name in found]
        there = [entry for entry in entries if entry is not None]
        if not there:
            continue
        cells = [recipe.title]
        for entry in entries:
            cells.append("" if entry is None else _found(entry, is_baseline=name == BASELINE))
        for key, digits in (("bytes_per_token", 0), ("step_cpu_s", 2)):
            cells.append(f"{statistics.mean(entry[key] for entry in there):,.{digits}f}")
        yield f"| {' | '.join([*cells, _of_memory(memory, name)])} |"


def _found(entry: Mapping[str, Any], *, is_baseline: bool) -> str:
    """The baseline's loss; of others, whether they are as good, and the difference to it."""
    if is_baseline:
        return f"loss {entry['loss']:.3f}"
    verdict, points = "as good" if entry["as_good"] else "not", entry["points_difference"]
    too_few_right = points is not None and points[0] < -POINTS_BAR
    return f"{verdict}, {entry['loss_difference'][0]:+.3f}" + (f" and {points[0]:+.1f} points" if too_few_right else "")


def _of_memory(memory: Mapping[str, float], name: str) -> str:
    return f"{memory[name]:,.0f}" if name in memory else ""


def _shown(numbers: list[float] | None, digits: int) -> str:
    if numbers is None:
        return ""
    mean, low, high = numbers
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
