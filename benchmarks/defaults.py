"""What a user gets who names no learning rate, against the best of a grid: on several models and kinds of data.

Models: SmolLM2, the same written otherwise (norms, v and up larger or smaller, what reads them the other way round, so
that the function stays), and small ones of four other families, which small_models.py trains here. Runs are made and
kept as those of economy.py, whose runs count here too. A line a run; --only names some, --max-minutes ends after the
run under way, --report makes none. The guard has no part in it: what is tested is what a run ends with. JSON goes to
stdout; docs/log/benchmarks/defaults.json and a section of docs/log/benchmarks.md are written at the end.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from children import log
from defaults_places import GRID, SMOLLM2, Place, all_places, recipes_of
from defaults_report import write_report
from economy import make_runs
from economy_measure import add_run_options
from economy_runs import Plan, RunsFile

from dlora.edge.engine.bundle import Bundle


def main() -> None:
    """Make the runs that are missing, write the report, print JSON."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with us
    runs = RunsFile(options.runs)
    runs.runs |= RunsFile(options.docs / "benchmarks" / "economy-runs.jsonl").runs  # what it has is not made again
    ends = time.monotonic() + 60 * options.max_minutes
    for place in [] if options.report else all_places():
        if time.monotonic() < ends and is_wanted(options.only, place.model, "*"):
            _make_runs(runs, place, options, ends)
    print(json.dumps(write_report(runs.runs, options.docs), indent=1))


def _make_runs(runs: RunsFile, place: Place, options: argparse.Namespace, ends: float) -> None:
    folder, bundle = place.need_model(options.work), _need_bundle(place, options.work)
    recipes = recipes_of(place, Bundle.open(bundle).manifest)
    in_order = [
        (set_name, name)
        for set_name in place.sets
        for name, recipe in recipes.items()
        if set_name in recipe.sets and is_wanted(options.only, place.model, set_name, name)
    ]
    log(f"{place.model}: {len(in_order)} recipes and sets")
    left = {"only": [], "max_minutes": (ends - time.monotonic()) / 60}
    of_place = {"model": folder, "bundle": bundle, "work": options.work / place.model}
    here = argparse.Namespace(**vars(options) | of_place | left)
    make_runs(runs, Plan(place.model, options.dtype, recipes=recipes, grid=GRID), in_order, here, has_curve=False)


def is_wanted(patterns: Sequence[str], *names: str) -> bool:
    """Whether MODEL/SET/RECIPE, or as much of it as is known, is one of those that ``patterns`` name."""
    return not patterns or any(
        all(name == "*" or fnmatch.fnmatch(name, part) for name, part in zip(names, pattern.split("/"), strict=False))
        for pattern in patterns
    )


def _need_bundle(place: Place, work: Path) -> Path:
    """The model's bundle, with the blocks that ``trunk`` has on the device."""
    out = work / place.model / "bundle"
    if not (out / "manifest.json").exists():
        command = [sys.executable, "-m", "dlora.export", place.need_model(work), "--out", str(out), "--force"]
        command += ["--device-blocks", str(place.device_blocks)]
        if place.model != SMOLLM2:
            command += ["--base-model-name", place.model]
        log(f"{place.model}: exporting")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--docs", type=Path, default=Path("docs/log"), help="where what is found is written")
    add_run_options(parser, work="build/benchmarks/defaults", names="MODEL/SET/RECIPE")
    options = parser.parse_args()
    options.runs = options.runs or options.docs / "benchmarks" / "defaults-runs.jsonl"
    return options


if __name__ == "__main__":
    main()
