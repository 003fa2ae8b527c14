"""What a run costs on the wire, and what it is worth: recipes against each other on six sets.

Each recipe trains a fresh adapter over a real websocket against one server; runs of two recipes with one seed see the
same rows in the same order. The learning rate of each is chosen on validation rows, from one grid. A finished run is a
line of --runs and is never made again, so that the hours that all of them take can be had in pieces: --only names some
of them, --max-minutes ends after the run under way, --report makes none. --quick is a taste in minutes, kept apart.
JSON goes to stdout; docs/benchmarks.md, docs/benchmarks/economy.json and the plots beside it are written at the end.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Self

from children import QUIET_THREADS, cloud_server, log, need_bundle

os.environ.update({key: os.environ.get(key, value) for key, value in QUIET_THREADS.items()})

import msgspec
import numpy as np
from economy_data import Data, load
from economy_recipes import BASELINE, DEFAULT, RECIPES, order, train_config
from economy_report import write_report
from economy_runs import CURVE, CURVE_ROWS, Finished, Plan, Point, Rows, Run, RunsFile, Score, Settings

from dlora.edge.data.batches import evaluation_batches
from dlora.edge.data.examples import Dataset
from dlora.edge.data.invocation import find_invocation
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.run.run import total_steps
from dlora.edge.training.metrics import StepMetrics
from dlora.edge.training.optimizer import OptimizerConfig
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connection import Connection
from dlora.protocol.errors import NonFiniteError
from dlora.protocol.traffic import report_traffic

QUICK = (f"b10/{BASELINE}", f"b10/{DEFAULT}", "b10/static-1/8", "b10/one-block")


def main() -> None:
    """Make the runs that are missing, write the report, print JSON."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with us
    runs = RunsFile(options.runs)
    plan = Plan(options.model, options.dtype, quick=options.quick)
    if not options.report:
        _make_runs(runs, plan, options)
    print(json.dumps(write_report(runs.runs, plan, options.docs), indent=1))


def _make_runs(runs: RunsFile, plan: Plan, options: argparse.Namespace) -> None:
    bundle = Bundle.open(need_bundle(options.bundle))
    tokenizer = EdgeTokenizer.open(bundle)
    ends = time.monotonic() + 60 * options.max_minutes
    data: dict[str, Data] = {}
    with cloud_server(options.model, options.threads, "--dtype", options.dtype) as (url, _):
        while time.monotonic() < ends:
            settings = _next(runs.runs, plan, options.only)
            if settings is None:
                break
            if settings.set not in data:
                data[settings.set] = load(settings.set, options.data, options.work, tokenizer)
            _check_data(runs.runs, settings.set, data[settings.set])
            log(f"{_name(settings)} …")
            result = run(bundle, url, data[settings.set], settings, options.threads)
            runs.append(result)
            log(f"{_name(settings)}: {_summary(result)}")


def _next(finished: Finished, plan: Plan, only: list[str]) -> Settings | None:
    """The next run of all that are wanted and that this version of dlora can make."""
    for set_name, recipe in order():
        name = f"{set_name}/{recipe}"
        is_wanted = not only or any(fnmatch.fnmatch(name, each) or each == set_name for each in only)
        if is_wanted and not RECIPES[recipe].missing():
            settings = plan.next(finished, set_name, recipe)
            if settings is not None:
                return settings
    return None


def _check_data(finished: Finished, set_name: str, data: Data) -> None:
    """Runs with different rows are not to be compared."""
    if any(run.settings.set == set_name and run.data != data.fingerprint for run in finished.values()):
        raise SystemExit(f"error: the finished runs of {set_name} were made with other data; choose another --runs")


def _name(settings: Settings) -> str:
    return f"{settings.set}/{settings.recipe}, lr {settings.lr:g}, seed {settings.seed}"


def _summary(result: Run) -> str:
    if result.validation is None or result.test is None:
        return f"diverged at step {result.steps}"
    return (
        f"validation {result.validation.loss:.4f}, test {result.test.loss:.4f}, {result.test.accuracy:.1%} right, "
        f"{result.bytes_per_token:,.0f} B/token, {result.wall_s:.0f} s for {result.steps} steps"
    )


# -- one run -----------------------------------------------------------------------------------------------


def run(bundle: Bundle, url: str, data: Data, settings: Settings, threads: int) -> Run:
    """Train once, evaluate on the way and on all held-out rows. A run that diverges has no scores."""
    steps = total_steps(data.train, epochs=1, steps=settings.steps, batch_size=settings.batch_size, grad_accum=1)
    recipe = RECIPES[settings.recipe]
    config = train_config(
        recipe,
        steps=steps,
        batch_size=settings.batch_size,
        seed=settings.seed,
        optimizer=msgspec.convert(
            {"lr": settings.lr, "schedule": settings.schedule, "warmup": settings.warmup}, OptimizerConfig
        ),
        defaults=bundle.manifest.defaults,
        invocation=find_invocation(data.train) if recipe.acts_on_answers else (),
    )
    validation, test = (_first(part, settings.rows) for part in (data.validation, data.test))
    few = _first(validation, CURVE_ROWS)
    stops = {round(share * steps) for share in CURVE}
    rows: list[StepMetrics] = []
    curve: list[Point] = []
    scores: dict[str, Score] = {}
    meter = Meter()
    with Connection(url) as connection:
        trainer = Trainer(bundle, OnnxEngine(bundle, threads), connection, config, data.train)
        meter.trainer = trainer
        set_up = sum(trainer.traffic)
        try:
            while len(rows) < steps:
                rows.append(trainer.run_step())
                if len(rows) in stops:
                    trainer.wait_for_signal()  # its bytes are the step's, not the evaluation's
                    cost = meter.cost()
                    with meter.aside():
                        loss = score(_evaluate(trainer, few, settings.batch_size)).loss
                    curve.append(Point(len(rows), cost.bytes, loss, cost.round_trips, *cost.seconds))
            trainer.wait_for_signal()
            cost = meter.cost()
            with meter.aside():
                found = _evaluate(trainer, validation, settings.batch_size)
                tested = _evaluate(trainer, test, settings.batch_size)
            curve.append(Point(len(rows), cost.bytes, score(found[:CURVE_ROWS]).loss, cost.round_trips, *cost.seconds))
            scores = {"validation": score(found), "test": score(tested, keep_rows=True)}
        except NonFiniteError as error:
            log(f"diverged: {error}")
            cost = meter.cost()
        assert trainer.session.ticket is not None
        report = report_traffic(len(trainer.adapters.units), len(trainer.session.ticket))
        tokens = sum(row.tokens for row in rows)
        return Run(
            digest=settings.digest,
            settings=settings,
            data=data.fingerprint,
            commit=_commit(),
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            steps=len(rows),
            tokens=tokens,
            labelled=sum(row.labelled for row in rows),
            bytes_up=cost.bytes_up,
            bytes_down=cost.bytes_down,
            set_up_bytes=set_up,
            report_bytes=len(rows) * (report.bytes_up + report.bytes_down),
            evaluation_bytes=meter.evaluation.bytes,
            bytes_per_token=round(cost.bytes / max(1, tokens), 1),
            round_trips_per_step=statistics.median(row.round_trips for row in rows) if rows else 0,
            edge_compute_s=round(sum(row.edge_compute_s for row in rows), 2),
            device_cpu_s=cost.seconds[0],
            wall_s=cost.seconds[1],
            train_loss_last=round(statistics.mean(row.loss for row in rows[-50:]), 6) if scores else None,
            reconnects=connection.reconnects,
            steps_rerun=trainer.steps_rerun,
            curve=curve,
            validation=scores.get("validation"),
            test=scores.get("test"),
        )


class Cost(NamedTuple):
    """What was spent so far."""

    bytes_up: int = 0
    bytes_down: int = 0
    round_trips: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0

    @classmethod
    def now(cls, trainer: Trainer | None) -> Self:
        session = None if trainer is None else trainer.connection.session
        counted = (session.bytes_sent, session.bytes_received, session.round_trips) if session else (0, 0, 0)
        return cls(*counted, time.process_time(), time.perf_counter())

    @property
    def bytes(self) -> int:
        return self.bytes_up + self.bytes_down

    @property
    def seconds(self) -> tuple[float, float]:
        """Of the processor and by the clock."""
        return round(self.cpu_s, 2), round(self.wall_s, 1)

    def plus(self, other: Cost, sign: int = 1) -> Cost:
        up, down, trips, cpu, wall = (mine + sign * theirs for mine, theirs in zip(self, other, strict=True))
        return Cost(int(up), int(down), int(trips), cpu, wall)


class Meter:
    """What training has cost since the meter was made, and apart from it what evaluations have.

    Attributes:
        trainer: whose connection is counted, once there is one.
        evaluation: the cost of all that was done ``aside``.
    """

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.evaluation = Cost()
        self._began = Cost.now(None)

    def cost(self) -> Cost:
        """What training has cost so far."""
        return Cost.now(self.trainer).plus(self._began, -1).plus(self.evaluation, -1)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done meanwhile is no training."""
        before = Cost.now(self.trainer)
        try:
            yield
        finally:
            self.evaluation = self.evaluation.plus(Cost.now(self.trainer).plus(before, -1))


class Row(NamedTuple):
    """A held-out row: its summed loss, its labels, and whether all of them were likeliest."""

    loss: float
    labels: int
    is_right: bool


def _evaluate(trainer: Trainer, dataset: Dataset, batch_size: int) -> list[Row]:
    """As ``Trainer.evaluate``, but row by row."""
    rows: list[Row] = []
    for batch in evaluation_batches(dataset.acting_on_answers(trainer.config.invocation), batch_size):
        losses, predictions = trainer.model.evaluate(batch)
        ends = np.searchsorted(batch.label_positions, np.cumsum(batch.sequence_lengths))
        is_right, start = predictions == batch.labels, 0
        for end in ends.tolist():
            loss = float(losses[start:end].sum(dtype=np.float64))
            if not math.isfinite(loss):
                raise NonFiniteError("NaN or infinity in a held-out loss")
            rows.append(Row(loss, end - start, bool(is_right[start:end].all())))
            start = end
    return rows


def score(rows: Sequence[Row], *, keep_rows: bool = False) -> Score:
    """Mean loss a label and share of right rows; ``keep_rows``: and each row's."""
    kept = Rows(
        losses=[round(1000 * row.loss) for row in rows],
        labels=[row.labels for row in rows],
        right="".join("1" if row.is_right else "0" for row in rows),
    )
    return Score(
        loss=round(math.fsum(row.loss for row in rows) / sum(row.labels for row in rows), 5),
        accuracy=round(sum(row.is_right for row in rows) / len(rows), 5),
        rows=kept if keep_rows else None,
    )


def _first(dataset: Dataset, count: int | None) -> Dataset:
    return dataset if count is None or count >= len(dataset) else dataset.subset(range(count))


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


# -- the command -------------------------------------------------------------------------------------------


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_data = Path(os.environ.get("DLORA_DATA", "../shared/data"))
    parser.add_argument("--bundle", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=default_data)
    parser.add_argument("--runs", type=Path, help="docs/benchmarks/economy-runs.jsonl by default")
    parser.add_argument("--docs", type=Path, help="where the report goes: docs by default")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/economy"), help="for the sets as JSONL")
    parser.add_argument("--dtype", default="bfloat16", help="of the base model on the server")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], metavar="SET/RECIPE", help="a set alone, or with * as well")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--report", action="store_true", help="make no runs, write what stands there")
    parser.add_argument("--quick", action="store_true", help="20 steps, 40 rows, one rate, four recipes, other files")
    options = parser.parse_args()
    home = Path("build/benchmarks/economy-quick") if options.quick else Path("docs")
    options.docs = options.docs or home
    options.runs = options.runs or options.docs / "benchmarks" / "economy-runs.jsonl"
    options.only = options.only or (list(QUICK) if options.quick else [])
    return options


if __name__ == "__main__":
    main()
