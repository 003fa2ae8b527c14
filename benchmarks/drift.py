"""On a task that drifts: does an adaptive score of Kill and Revive beat ``random`` and ``static`` with the same budget?

Task A is ten intents of Banking77, task B ten others. Each seed trains the default recipe on A, once; from its adapter
every variant trains on B, and is then evaluated on both: what it has learnt, and what it has kept. Everything goes over
a real websocket against one server. A finished run is a line of --runs and is never made again: --only names variants,
--max-minutes ends after the run under way, --report makes none. --quick is a taste in minutes, kept apart.
JSON goes to stdout; docs/benchmarks/drift.json and a section of docs/benchmarks.md are written at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from children import QUIET_THREADS, cloud_server, log, need_bundle

os.environ.update({key: os.environ.get(key, value) for key, value in QUIET_THREADS.items()})

from drift_report import write_report
from drift_runs import TASKS, VARIANTS, Plan, Run, Task, Ticks, changed_units, steps_held
from economy_data import Data, banking, load_parts
from economy_measure import Meter, add_place_options, evaluate_rows, first, last_loss, score, trained_fields
from economy_recipes import DEFAULT, RECIPES, train_config
from economy_runs import Score, Settings, TrainedFile

from dlora.edge.adapters.peft import LoadedAdapter, load_adapter
from dlora.edge.data.invocation import find_invocation
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.run.plan import total_steps
from dlora.edge.training.metrics import StepMetrics
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connection import Connection
from dlora.protocol.adapter_record import WEIGHTS_NAME
from dlora.protocol.adapters import kind_of
from dlora.protocol.errors import NonFiniteError
from dlora.protocol.frames import frame_bytes
from dlora.protocol.wire_codecs import TensorRole

INTENTS = 10
VALIDATION_ROWS = 160


def main() -> None:
    """Make the runs that are missing, write the report, print JSON."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with us
    runs = TrainedFile(options.runs, Run)
    ticks = Ticks(**{name: getattr(options, name) for name in Ticks._fields})
    plan = Plan(options.model, options.dtype, ticks, quick=options.quick)
    if not options.report:
        _make_runs(runs, plan, options)
    print(json.dumps(write_report(runs.runs, plan, options.docs), indent=1))


def _make_runs(runs: TrainedFile[Run], plan: Plan, options: argparse.Namespace) -> None:
    bundle = Bundle.open(need_bundle(options.bundle))
    ends = time.monotonic() + 60 * options.max_minutes
    wanted = [
        (variant, seed)
        for variant, seed in plan.order()
        if (not options.only or variant in options.only) and plan.settings(variant, seed).digest not in runs.runs
    ]
    if not wanted:
        return
    tasks = Tasks.load(options.data, options.work, EdgeTokenizer.open(bundle))
    if any(run.data != tasks.fingerprint for run in runs.runs.values()):
        raise SystemExit("error: the finished runs were made with other data; choose another --runs")
    with cloud_server(options.model, options.threads, "--dtype", options.dtype) as (url, _):
        place = Place(bundle, url, tasks, options.threads)
        for variant, seed in wanted:
            if time.monotonic() >= ends:
                break
            adapter = _trained_on_first(runs, place, plan.first(seed), options.work)
            if adapter is None:
                log(f"{variant}, seed {seed}: left out, the run on task A diverged")
                continue
            runs.append(_logged_run(place, plan.settings(variant, seed), init=load_adapter(adapter)))


def _trained_on_first(runs: TrainedFile[Run], place: Place, settings: Settings, work: Path) -> Path | None:
    """The adapter of a run on task A, which is made where it is not there; None where the run diverged."""
    adapter = work / f"adapter-{settings.digest}"
    finished = runs.runs.get(settings.digest)
    if finished is not None and finished.test is None:
        return None
    if finished is None or not (adapter / WEIGHTS_NAME).exists():
        made = _logged_run(place, settings, out=adapter)
        if finished is None:
            runs.append(made)
        if made.test is None:
            return None
    return adapter


def _logged_run(
    place: Place, settings: Settings, *, init: LoadedAdapter | None = None, out: Path | None = None
) -> Run:
    log(f"{settings.recipe}, seed {settings.seed} …")
    result = run(place, settings, init=init, out=out)
    if result.test is None:
        log(f"{settings.recipe}, seed {settings.seed}: diverged at step {result.steps}")
        return result
    found = ", ".join(f"{task} {each.loss:.4f} {each.accuracy:.1%}" for task, each in result.test.items())
    log(
        f"{settings.recipe}, seed {settings.seed}: {found} right, {result.bytes_per_token:,.0f} B/token, "
        f"{result.kills} kills, {result.revivals} revivals, {result.wall_s:.0f} s for {result.steps} steps"
    )
    return result


# -- one run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tasks:
    """Both tasks as tokens, and the invocation from which on adapters act in both."""

    data: dict[Task, Data]
    invocation: tuple[int, ...]

    @classmethod
    def load(cls, folder: Path, work: Path, tokenizer: EdgeTokenizer) -> Tasks:
        """As the set ``b10`` of ``economy.py``, of its intents and of the next ten."""
        data: dict[Task, Data] = {}
        for place, task in enumerate(TASKS):
            parts = banking(INTENTS * place, INTENTS, VALIDATION_ROWS)(folder)
            data[task] = load_parts(f"task-{task}", parts, work, tokenizer)
        return cls(data, find_invocation(data["a"].train, [data["b"].train]))

    @property
    def fingerprint(self) -> str:
        """Of both."""
        return "-".join(self.data[task].fingerprint for task in TASKS)


@dataclass(frozen=True)
class Place:
    """Where runs are made."""

    bundle: Bundle
    url: str
    tasks: Tasks
    threads: int


def run(place: Place, settings: Settings, *, init: LoadedAdapter | None, out: Path | None) -> Run:
    """Train once on the task ``settings.set``, evaluate on both. A run that diverges has no scores.

    Args:
        init: the adapter to begin with; out: where the adapter is saved in the end.
    """
    train, batch_size = place.tasks.data["a" if settings.set == "a" else "b"].train, settings.batch_size
    steps = total_steps(train, epochs=1, steps=settings.steps, batch_size=batch_size, grad_accum=1)
    config = train_config(
        dataclasses.replace(RECIPES[DEFAULT], adapter=settings.adapter, kill_revive=settings.kill_revive),
        steps=steps,
        batch_size=batch_size,
        seed=settings.seed,
        optimizer=settings.optimizer,
        defaults=place.bundle.manifest.defaults,
        invocation=place.tasks.invocation,
    )
    rows: list[StepMetrics] = []
    scores: dict[str, dict[Task, Score]] = {}
    meter = Meter()
    with Connection(place.url) as connection:
        engine = OnnxEngine(place.bundle, place.threads)
        trainer = Trainer(place.bundle, engine, connection, config, train, init=init)
        meter.trainer = trainer
        set_up = sum(trainer.traffic)
        try:
            while len(rows) < steps:
                rows.append(trainer.run_step())
            trainer.wait_for_signal()
            cost = meter.cost()
            if out is not None:
                trainer.save_adapter(out)
            with meter.aside():
                scores = _evaluate_both(trainer, place.tasks, settings)
        except NonFiniteError as error:
            log(f"diverged: {error}")
            cost = meter.cost()
        units = [row.units for row in rows] + ["".join(map(str, trainer.adapters.states()))]
        return Run(
            **trained_fields(settings, trainer, rows, cost, set_up_bytes=set_up),
            data=place.tasks.fingerprint,
            evaluation_bytes=meter.evaluation.bytes,
            train_loss_last=last_loss(rows) if scores else None,
            history=changed_units(units),
            given_bytes=_given_bytes(trainer, units) if config.kill_revive.gives_to_server else 0,
            validation=scores.get("validation"),
            test=scores.get("test"),
        )


def _evaluate_both(trainer: Trainer, tasks: Tasks, settings: Settings) -> dict[str, dict[Task, Score]]:
    """Scores by part and task; rows are kept of the test."""
    found: dict[str, dict[Task, Score]] = {"validation": {}, "test": {}}
    for task, data in tasks.data.items():
        for part, dataset in (("validation", data.validation), ("test", data.test)):
            rows = evaluate_rows(trainer, first(dataset, settings.rows), settings.batch_size)
            found[part][task] = score(rows, keep_rows=part == "test")
    return found


def _given_bytes(trainer: Trainer, units: list[str]) -> int:
    """Bytes of all ``GroupParameters`` and their answers: one of each group of a unit, whenever it is HELD."""
    spec, codec = trainer.adapters.adapter_spec, trainer.config.codecs.of(TensorRole.GROUP_PARAMETERS)
    total = 0
    for unit, times in zip(trainer.adapters.units, steps_held(units), strict=True):
        for group in unit.groups:
            shapes = kind_of(spec).parameter_shapes(spec, trainer.groups[group]).values()
            total += times * (frame_bytes(1, [codec.nbytes(*shape) for shape in shapes]) + frame_bytes(1, []))
    return total


# -- the command -------------------------------------------------------------------------------------------


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_place_options(parser)
    parser.add_argument("--runs", type=Path, help="docs/benchmarks/drift-runs.jsonl by default")
    parser.add_argument("--docs", type=Path, help="where the report goes: docs by default")
    parser.add_argument("--work", type=Path, help="for the tasks as JSONL, and the adapters of task A")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", choices=list(VARIANTS))
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--report", action="store_true", help="make no runs, write what stands there")
    parser.add_argument("--quick", action="store_true", help="20 steps, 40 rows, one seed, three variants, other files")
    usual = Ticks()
    parser.add_argument("--kill-every", type=int, default=usual.kill_every, help="steps")
    parser.add_argument("--revive-every", type=int, default=usual.revive_every, help="steps")
    parser.add_argument("--revive-share", type=float, default=usual.revive_share, help="of the active units, on trial")
    parser.add_argument("--probation", type=int, default=usual.probation, help="steps")
    options = parser.parse_args()
    home = Path("build/benchmarks/drift-quick") if options.quick else Path("docs")
    options.docs = options.docs or home
    options.runs = options.runs or options.docs / "benchmarks" / "drift-runs.jsonl"
    options.work = options.work or Path("build/benchmarks/drift-quick" if options.quick else "build/benchmarks/drift")
    return options


if __name__ == "__main__":
    main()
