"""What a run costs on the wire, and what it is worth: recipes against each other on six sets.

Each recipe trains a fresh adapter over a real websocket against one server; runs of two recipes with one seed see the
same rows in the same order. The learning rate of each but the default, which finds its own, is chosen on validation
rows, from one grid. A finished run is a line of --runs and is never made again, so that the hours that all of them take
can be had in pieces: --only names some of them, --max-minutes ends after the run under way, --report makes none.
--quick is a taste in minutes, kept apart. JSON goes to stdout; docs/log/benchmarks.md, docs/log/benchmarks/economy.json
and the plots beside it are written at the end.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from children import cloud_server, log, need_bundle, new_parser
from economy_data import Data, load
from economy_measure import Cost, Meter, add_run_options, evaluate_rows, score
from economy_recipes import BASELINE, DEFAULT, Recipe, order, train_config
from economy_report import write_report
from economy_runs import CURVE, CURVE_ROWS, Finished, Plan, Point, Run, RunsFile, Score, Settings
from economy_trunk import open_source

from dlora.edge.data.examples import Dataset
from dlora.edge.data.invocation import find_invocation
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.training.expected import total_steps
from dlora.edge.training.metrics import StepMetrics
from dlora.edge.training.resolved import Resolved
from dlora.edge.training.side import DeviceSide, ServerSide
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connection import Connection
from dlora.protocol.errors import NonFiniteError
from dlora.protocol.groups import without_gains
from dlora.protocol.traffic import report_traffic

QUICK = (f"b10/{BASELINE}", f"b10/{DEFAULT}", "b10/static-1/8", "b10/one-block")


def main() -> None:
    """Make the runs that are missing, write the report, print JSON."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with us
    runs = RunsFile(options.runs)
    plan = Plan(options.model, options.dtype, quick=options.quick)
    if not options.report:
        make_runs(runs, plan, list(order()), options)
    print(json.dumps(write_report(runs.runs, plan, options.docs), indent=1))


def make_runs(
    runs: RunsFile, plan: Plan, in_order: Sequence[tuple[str, str]], options: argparse.Namespace, has_curve: bool = True
) -> None:
    """Make the runs that are missing of ``in_order``, (set, recipe), as far as ``options`` want them."""
    bundle = Bundle.open(need_bundle(options.bundle))
    tokenizer = EdgeTokenizer.open(bundle)
    ends = time.monotonic() + 60 * options.max_minutes
    data: dict[str, Data] = {}
    with cloud_server(options.model, options.threads, "--dtype", options.dtype) as url:
        while time.monotonic() < ends:
            settings = _next(runs.runs, plan, in_order, options.only)
            if settings is None:
                break
            if settings.set not in data:
                data[settings.set] = load(settings.set, options.data, options.work, tokenizer)
            _check_data(runs.runs, settings, data[settings.set])
            log(f"{_name(settings)} …")
            recipe = plan.recipes[settings.recipe]
            given = bundle if recipe.gains else _without_gains(bundle)
            place = Place(given, url, options.threads, options.work, has_curve)
            result = run(place, data[settings.set], settings, recipe)
            runs.append(result)
            log(f"{_name(settings)}: {_summary(result)}")


def _next(finished: Finished, plan: Plan, in_order: Sequence[tuple[str, str]], only: list[str]) -> Settings | None:
    """The next run of all that are wanted."""
    for set_name, recipe in in_order:
        is_wanted = not only or any(fnmatch.fnmatch(f"{set_name}/{recipe}", each) or each == set_name for each in only)
        if is_wanted and (settings := plan.next(finished, set_name, recipe)) is not None:
            return settings
    return None


def _check_data(finished: Finished, settings: Settings, data: Data) -> None:
    """Runs with different rows are not to be compared."""
    alike = [run for run in finished.values() if run.settings.set == settings.set]
    if any(run.data != data.fingerprint for run in alike if run.settings.model == settings.model):
        raise SystemExit(f"error: the finished runs of {settings.set} were made with other data; choose another --runs")


def _without_gains(bundle: Bundle) -> Bundle:
    groups = without_gains(bundle.manifest.groups)
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, groups=groups))


def _name(settings: Settings) -> str:
    rate = "found" if settings.lr is None else f"{settings.lr:g}"
    return f"{settings.set}/{settings.recipe}, lr {rate}, seed {settings.seed}"


def _summary(result: Run) -> str:
    if result.validation is None or result.test is None:
        return f"diverged at step {result.steps}"
    return (
        f"validation {result.validation.loss:.4f}, test {result.test.loss:.4f}, {result.test.accuracy:.1%} right, "
        f"{result.bytes_per_token:,.0f} B/token, {result.wall_s:.0f} s for {result.steps} steps"
        + (f", lr {result.found_lr:g}" if result.found_lr else "")
    )


# -- one run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where runs are made.

    Attributes:
        work: for files that several of them use.
        has_curve: whether runs are evaluated on their way as well.
    """

    bundle: Bundle
    url: str
    threads: int
    work: Path
    has_curve: bool = True


def run(place: Place, data: Data, settings: Settings, recipe: Recipe) -> Run:
    """Train once, evaluate on the way and on all held-out rows. A run that diverges has no scores."""
    steps = total_steps(data.train, epochs=1, steps=settings.steps, examples_a_step=settings.batch_size)
    answers = recipe.acts_on_answers and not data.train.facts.is_plain_text
    config = train_config(
        recipe, place.bundle.manifest, steps=steps, batch_size=settings.batch_size, seed=settings.seed,
        optimizer=settings.optimizer, invocation=find_invocation(data.train) if answers else (),
    )  # fmt: skip
    validation, test = (_first(part, settings.rows) for part in (data.validation, data.test))
    few = _first(validation, CURVE_ROWS)
    stops = {round(share * steps) for share in CURVE} if place.has_curve else set()
    rows: list[StepMetrics] = []
    curve: list[Point] = []
    scores: dict[str, Score] = {}
    meter = Meter()

    def evaluated(cost: Cost, loss: float) -> None:
        curve.append(Point(len(rows), cost.bytes, loss, cost.round_trips, *cost.seconds))

    with _trainer(place, config, data, settings.set) as (trainer, known):
        meter.trainer = trainer
        if known is not None:
            meter.begin_again(trainer, known)
        set_up = meter.cost().bytes
        found = trainer.find_rate() if settings.lr is None and recipe.trains else None
        if found is not None:
            log(f"of first updates in {found.tries} sizes, one of {found.size:.3g} did best")
        rate_bytes = meter.cost().bytes - set_up
        try:
            while len(rows) < steps and recipe.trains:
                rows.append(trainer.run_step())
                if len(rows) in stops:
                    trainer.wait_for_signal()  # its bytes are the step's, not the evaluation's
                    cost = meter.cost()
                    with meter.aside():
                        evaluated(cost, score(evaluate_rows(trainer, few, settings.batch_size)).loss)
            trainer.wait_for_signal()
            cost = meter.cost()
            with meter.aside():
                validated = evaluate_rows(trainer, validation, settings.batch_size)
                tested = evaluate_rows(trainer, test, settings.batch_size)
                if config.passes is not None:
                    scores["test_in_passes"] = score(evaluate_rows(trainer, test, settings.batch_size, live=False))
            evaluated(cost, score(validated[:CURVE_ROWS]).loss)
            scores |= {"validation": score(validated), "test": score(tested, keep_rows=True)}
        except NonFiniteError as error:
            log(f"diverged: {error}")
            cost = meter.cost()
        return Run(
            digest=settings.digest,
            settings=settings,
            data=data.fingerprint,
            commit=_commit(),
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            **_of_steps(rows, cost),
            bytes_up=cost.bytes_up,
            bytes_down=cost.bytes_down,
            set_up_bytes=set_up,
            rate_bytes=rate_bytes,
            report_bytes=0 if settings.device_blocks else len(rows) * _report_bytes(trainer),
            evaluation_bytes=meter.evaluation.bytes,
            device_cpu_s=cost.seconds[0],
            wall_s=cost.seconds[1],
            train_loss_last=round(statistics.mean(row.loss for row in rows[-50:]), 6) if scores and rows else None,
            reconnects=trainer.side.crossed.reconnects,
            steps_rerun=trainer.steps_rerun,
            found_lr=None if found is None else found.lr,
            curve=curve,
            **{name: scores.get(name) for name in ("validation", "test", "test_in_passes")},
        )


def _of_steps(rows: Sequence[StepMetrics], cost: Cost) -> dict[str, Any]:
    tokens = sum(row.tokens for row in rows)
    return {
        "steps": len(rows),
        "tokens": tokens,
        "labelled": sum(row.labelled for row in rows),
        "bytes_per_token": round(cost.bytes / max(1, tokens), 1),
        "round_trips_per_step": statistics.median(row.round_trips for row in rows) if rows else 0,
        "edge_compute_s": round(sum(row.edge_compute_s for row in rows), 2),
    }


def _report_bytes(trainer: Trainer) -> int:
    assert trainer.session.ticket is not None
    report = report_traffic(len(trainer.adapters.units), len(trainer.session.ticket))
    return report.bytes_up + report.bytes_down


def _first(dataset: Dataset, count: int | None) -> Dataset:
    """The first rows of a data set; None: all."""
    return dataset if count is None or count >= len(dataset) else dataset.subset(range(count))


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


@contextmanager
def _trainer(place: Place, config: Resolved, data: Data, set_name: str) -> Iterator[tuple[Trainer, Cost | None]]:
    """A new run, and what it has cost already, where that is known from an earlier one."""
    engine = OnnxEngine(place.bundle, place.threads)
    if config.asks_once:
        file = place.work / f"{set_name}-{config.device_blocks}.cache"
        with open_source(place.bundle, engine, place.url, config, data, file) as (source, cost):
            yield Trainer(place.bundle, engine, partial(DeviceSide, source=source), config, data.train), cost
    else:
        with Connection(place.url) as connection:
            yield Trainer(place.bundle, engine, partial(ServerSide, connection=connection), config, data.train), None


# -- the command -------------------------------------------------------------------------------------------


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_run_options(parser, work="build/benchmarks/economy", names="SET/RECIPE")
    parser.add_argument("--quick", action="store_true", help="20 steps, 40 rows, one rate, four recipes, other files")
    parser.set_defaults(docs=None)
    options = parser.parse_args()
    options.docs = options.docs or Path("build/benchmarks/economy-quick" if options.quick else "docs/log")
    options.runs = options.runs or options.docs / "benchmarks" / "economy-runs.jsonl"
    options.only = options.only or (list(QUICK) if options.quick else [])
    return options


if __name__ == "__main__":
    main()
