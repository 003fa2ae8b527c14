"""A whole training run: start or resume, step, evaluate, save, stop when asked, and sum up."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from dlora.protocol import interrupts
from dlora.protocol.errors import DloraError, StoppedError, UsageError
from dlora.protocol.kill_revive import UnitState

from .atomic import locked, make_directory, write_atomically
from .bundle import Bundle
from .checkpoint import Checkpoint, list_checkpoints, load_latest
from .code_pages import release_code
from .config import TrainConfig
from .connection import Connection
from .credentials import Credentials
from .data import Dataset
from .dialing import Dialing, Liveness, Retry
from .engines import EngineName, make_engine
from .memory import peak_rss_mb
from .metrics import MetricsLog, read_metrics
from .pause import PauseRules, SystemSensors, wait_while_paused
from .peft_adapter import WEIGHTS_NAME, LoadedAdapter, load_adapter
from .report import Reporter
from .trainer import Trainer

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SUMMARY = "summary.json"
MAX_STEPS = 10**9


@dataclass(frozen=True)
class TrainRun:
    """What to run, and where to keep it.

    Attributes:
        engine: what runs the graphs; ``auto`` is ONNX Runtime where it and its graphs are there.
        max_retry_s: how long to try again when the server is gone. None: for ever once the run has begun, and a first
            connection that fails ends it.
    """

    bundle: Bundle
    server: str
    dataset: Dataset
    config: TrainConfig
    out: Path
    eval_dataset: Dataset | None = None
    eval_every: int = 0
    save_every: int = 50
    init_adapter: Path | None = None
    resume: bool = False
    threads: int = 0
    engine: EngineName | Literal["auto"] = "auto"
    credentials: Credentials = field(default_factory=Credentials)
    device: str = ""
    max_retry_s: float | None = None
    liveness: Liveness = field(default_factory=Liveness)
    pause: PauseRules = field(default_factory=PauseRules)


def train(run: TrainRun, reporter: Reporter) -> dict[str, Any]:
    """Train to the end and save the adapter; returns the summary that is also in ``summary.json``.

    Raises any ``DloraError``; ``StoppedError`` after the first Ctrl-C or SIGTERM, with the step under way
    finished and saved. A second Ctrl-C stops at once; the last checkpoint stands.
    """
    if run.out.exists() and not run.out.is_dir():
        raise UsageError(f"{run.out} is a file; choose another --out")
    init = load_adapter(run.init_adapter) if run.init_adapter else None
    with interrupts.raising():
        make_directory(run.out)
        with locked(run.out):
            return _train(run, reporter, init)


def _train(run: TrainRun, reporter: Reporter, init: LoadedAdapter | None) -> dict[str, Any]:
    checkpoint = _find_checkpoint(run, reporter)
    engine = make_engine(run.bundle, run.engine, run.threads)
    started = time.perf_counter()
    stop = _Stop()
    with Connection(run.server, _dialing(run, checkpoint, reporter, stop.asked)) as connection, stop.instead_of_dying():
        trainer = Trainer(run.bundle, engine, connection, run.config, run.dataset, init=init, checkpoint=checkpoint)
        release_code()
        first_step = trainer.next_step
        finished = _finished(run, first_step)
        if finished is not None:
            reporter.warn(f"this run is finished: all of its {first_step} steps are done; nothing was changed")
            return finished
        evaluations = _Evaluations(run, trainer, reporter, stop.asked)
        if first_step == 0:
            if init is not None:
                _warn_of_dropped(trainer, init, reporter)
            evaluations.add("before")
        with MetricsLog(run.out / METRICS, first_step) as log:
            for metrics in read_metrics(run.out / METRICS):
                reporter.remember(metrics)
            with reporter.training(run.config.total_steps, first_step):
                _run_steps(run, trainer, reporter, log, evaluations, stop.asked)
        trained_s = time.perf_counter() - started
        if run.config.total_steps > 0:
            evaluations.add("after")
        trainer.save_adapter(run.out)
    summary = _summary(run, evaluations.rows) | {
        "first_step": first_step,
        "reconnects": connection.reconnects,
        "sessions_resumed": connection.resumed,
        "steps_rerun": trainer.steps_rerun,
        "wall_s": round(trained_s, 3),
    }
    write_atomically(run.out / SUMMARY, json.dumps(summary, indent=1).encode() + b"\n")
    return summary


def _finished(run: TrainRun, first_step: int) -> dict[str, Any] | None:
    """The summary of a run that was summed up before: one that is resumed again would lose its times."""
    if first_step != run.config.total_steps:
        return None
    try:
        summary: dict[str, Any] = json.loads((run.out / SUMMARY).read_bytes())
    except (OSError, ValueError):
        return None
    return summary


def _dialing(run: TrainRun, checkpoint: Checkpoint | None, reporter: Reporter, stop: Callable[[], bool]) -> Dialing:
    """A run that has begun, in this process or an earlier one, does not end because its server is away."""
    at_start = checkpoint is not None or bool(run.max_retry_s)
    return Dialing(
        credentials=run.credentials,
        device=run.device,
        retry=Retry(max_s=run.max_retry_s, at_start=at_start),
        liveness=run.liveness,
        say=reporter.warn,
        should_stop=stop,
    )


def _run_steps(
    run: TrainRun,
    trainer: Trainer,
    reporter: Reporter,
    log: MetricsLog,
    evaluations: _Evaluations,
    stop: Callable[[], bool],
) -> None:
    """Step to the end; save and evaluate on the way."""
    last = run.config.total_steps
    sensors = SystemSensors()
    if warning := run.pause.warning(sensors):
        reporter.warn(warning)

    def save() -> None:
        trainer.save_checkpoint(run.out / CHECKPOINTS)
        trainer.save_adapter(run.out)

    while trainer.next_step < last:
        if evaluations.due() and not stop():
            # Whoever stops it stops the run, below, with all that is saved there.
            with _keeping_what_was_done(run, trainer), contextlib.suppress(StoppedError):
                evaluations.add(f"at step {trainer.next_step}")
        wait_while_paused(run.pause, sensors, say=reporter.say, should_stop=stop, on_pause=save)
        if stop():
            save()
            raise StoppedError(f"stopped after step {trainer.next_step}; go on with --resume")
        with _keeping_what_was_done(run, trainer):
            metrics = trainer.run_step()
        log.write(metrics)
        reporter.step(metrics)
        done = trainer.next_step
        if done % run.save_every == 0 or done == last:
            save()


@contextlib.contextmanager
def _keeping_what_was_done(run: TrainRun, trainer: Trainer) -> Iterator[None]:
    """Where there is no server, or no more of it, save a checkpoint: that needs none."""
    try:
        yield
    except DloraError:
        if trainer.next_step > 0:
            trainer.save_checkpoint(run.out / CHECKPOINTS)
        raise


class _Evaluations:
    """Held-out evaluations of a run, kept on disk so that a resumed run has those from before."""

    def __init__(self, run: TrainRun, trainer: Trainer, reporter: Reporter, stop: Callable[[], bool]) -> None:
        self._run = run
        self._trainer = trainer
        self._reporter = reporter
        self._stop = stop
        self._path = run.out / EVALUATIONS
        # Those of the history that goes on; the one after the last step is made again in any case.
        first_dropped = min(trainer.next_step + 1, run.config.total_steps)
        self.rows: list[dict[str, Any]] = self._load(first_dropped) if trainer.next_step else []

    def _load(self, first_dropped: int) -> list[dict[str, Any]]:
        """What stands in the file of earlier steps than ``first_dropped``; it is not worth a run, so damage is told."""
        found = []
        for line in self._path.read_bytes().splitlines() if self._path.exists() else []:
            try:
                row = json.loads(line)
                step, _ = row["step"], row["loss"]
                if step < first_dropped:
                    found.append(row)
            except (ValueError, TypeError, KeyError, RecursionError):
                self._reporter.warn(f"{self._path} has a damaged line, which is left out")
        return found

    def due(self) -> bool:
        """Whether one belongs between the last step and the next, and is not there."""
        every, step = self._run.eval_every, self._trainer.next_step
        return every > 0 and step > 0 and step % every == 0 and all(row["step"] != step for row in self.rows)

    def add(self, when: str) -> None:
        """Evaluate now, where there is held-out data. Raises ``StoppedError`` soon after somebody asked to stop."""
        run = self._run
        if run.eval_dataset is None:
            return
        with self._reporter.evaluating(when, len(run.eval_dataset)) as advance:

            def after_batch(examples: int, _: int) -> None:
                advance(examples)
                if self._stop():
                    raise StoppedError("stopped while evaluating; go on with --resume")

            result = self._trainer.evaluate(run.eval_dataset, after_batch)
        self._reporter.say(
            f"held-out loss {when}: {result.loss:.4f} over {result.tokens} tokens, "
            f"{result.token_accuracy:.1%} of tokens right"
        )
        self.rows.append({"step": self._trainer.next_step, **asdict(result)})
        write_atomically(self._path, b"".join(json.dumps(row).encode() + b"\n" for row in self.rows))


def _find_checkpoint(run: TrainRun, reporter: Reporter) -> Checkpoint | None:
    """The checkpoint to go on from; raises ``UsageError`` where a run is there that nobody asked to go on with."""
    directory = run.out / CHECKPOINTS
    if not run.resume:
        if list_checkpoints(directory):
            raise UsageError(f"{run.out} holds a run already; go on with --resume, or choose another --out")
        _refuse_to_replace(run.out)
        return None
    checkpoint = load_latest(directory, warn=reporter.warn)
    if checkpoint is None:
        _refuse_to_replace(run.out)
        reporter.warn(f"no checkpoint in {run.out}: starting from step 0")
    return checkpoint


def _refuse_to_replace(out: Path) -> None:
    """Raise ``UsageError`` where a new run's first save would replace an adapter that it does not go on from."""
    if (out / WEIGHTS_NAME).exists():
        raise UsageError(f"{out} holds an adapter that has no checkpoint; choose another --out")


def _warn_of_dropped(trainer: Trainer, init: LoadedAdapter, reporter: Reporter) -> None:
    """An adapter to start from may have modules in units that are killed from step 0 on."""
    adapters = trainer.adapters
    dropped = sum(
        adapter.name in init.modules
        for unit in adapters.units
        if unit.state is UnitState.KILLED
        for adapter in adapters.of_unit(unit)
    )
    if dropped:
        reporter.warn(
            f"{dropped} of the {len(init.modules)} modules of --init-adapter belong to units that are not active: "
            "they are left out, also of what is saved (--active-fraction 1 keeps all)"
        )


def _summary(run: TrainRun, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole run, what came before a resumption included."""
    rows = read_metrics(run.out / METRICS)
    totals = {
        name: sum(getattr(row, name) for row in rows)
        for name in ("tokens", "labelled", "bytes_up", "bytes_down", "round_trips")
    }
    losses = {row["step"]: row["loss"] for row in evaluations}
    return {
        "steps": run.config.total_steps,
        "eval_loss_before": losses.get(0),
        "eval_loss_after": losses.get(run.config.total_steps),
        "evaluations": evaluations,
        **totals,
        "edge_compute_s": round(sum(row.edge_compute_s for row in rows), 3),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "torch_loaded": "torch" in sys.modules,
        "adapter_dir": str(run.out),
    }


class _Stop:
    """Whether somebody asked to stop, with SIGINT or SIGTERM."""

    def __init__(self) -> None:
        self._asked = False

    def asked(self) -> bool:
        return self._asked

    @contextlib.contextmanager
    def instead_of_dying(self) -> Iterator[None]:
        """Within, the first signal asks to stop after the step, and the second one interrupts."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True


def total_steps(dataset: Dataset, *, epochs: float, steps: int | None, batch_size: int, grad_accum: int) -> int:
    """How many optimizer steps a run has, at least 1. Raises ``UsageError`` for more than a run may have."""
    if steps is not None:
        return steps
    if not epochs > 0:
        raise UsageError("--epochs must be above 0")
    wanted = epochs * -(-len(dataset) // (batch_size * grad_accum))
    if not wanted <= MAX_STEPS:
        raise UsageError(f"--epochs {epochs:g} makes more than {MAX_STEPS:,} steps; lower it")
    return max(1, math.ceil(wanted))
