"""What blocks on the device are worth: the last 4, 8 or 12 of 30 against all-active LoRA and the default, on four sets.

Runs are made, kept and reported as those of ``economy.py``, whose runs of the other two recipes they are compared with:
the same data, seeds and validation rows, and the same grid of rates but for the default, which finds its own. --report
makes none. JSON goes to stdout; the section of docs/log/benchmarks.md, docs/log/benchmarks/trunk-quality.json and the
bars in trunk.json are written at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path

from children import QUIET_THREADS

os.environ.update({key: os.environ.get(key, value) for key, value in QUIET_THREADS.items()})

from economy import make_runs
from economy_measure import add_place_options, add_run_options
from economy_runs import Plan, RunsFile
from trunk_quality_report import write_report
from trunk_recipes import COMPARED, order


def main() -> None:
    """Make the runs that are missing, write the report, print JSON."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with us
    runs = RunsFile(options.runs)
    plan = Plan(options.model, options.dtype, recipes=COMPARED)
    runs.runs |= RunsFile(options.docs / "benchmarks" / "economy-runs.jsonl").runs  # what it has is not made again
    if not options.report:
        make_runs(runs, plan, order(), options)
    print(json.dumps(write_report(runs.runs, plan, options.docs), indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_place_options(parser)
    add_run_options(parser, work="for what several runs use", names="SET/RECIPE")
    parser.set_defaults(bundle=Path("build/smollm2-blocks"), threads=1, work=Path("build/benchmarks/trunk"))
    parser.add_argument("--runs", type=Path, default=Path("docs/log/benchmarks/trunk-runs.jsonl"))
    parser.add_argument("--docs", type=Path, default=Path("docs/log"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
