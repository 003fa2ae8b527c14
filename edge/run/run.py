"""A whole training run: start or resume, step, evaluate, save, stop when asked, and sum up."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from dlora.edge.adapters.peft import LoadedAdapter
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import load_libraries, make_engine
from dlora.edge.files import locked, remove_quietly, write_atomically
from dlora.edge.memory import peak_rss_mb
from dlora.edge.model.cache_key import CacheKey
from dlora.edge.seeds import draw_seed
from dlora.edge.training.adapter_training import trainer_state
from dlora.edge.training.checkpoint import Checkpoint, list_checkpoints
from dlora.edge.training.expected import EvaluationPlan
from dlora.edge.training.metrics import MetricsLog, iterate_metrics, read_metrics
from dlora.edge.training.resolved import Resolved, RunIdentity, check_identity, continued
from dlora.edge.training.trainer import SetUpPiece, Trainer
from dlora.edge.wire.connecting import ConnectSettings, Liveness, Retry
from dlora.edge.wire.credentials import Credentials
from dlora.edge.wire.recorder import Recorder
from dlora.edge.wire.spans import Spans
from dlora.protocol import interrupts
from dlora.protocol.errors import CheckpointError, DloraError, StoppedError, StorageError
from dlora.protocol.files import read_regular
from dlora.protocol.kill_revive import UnitState
from dlora.protocol.messages import Welcome

from .blocks import fill_cache, open_blocks
from .directory import CACHE, CHECKPOINTS, KEPT_OUTPUTS, find_checkpoint, run_directory
from .display import Display
from .file_names import METRICS, SUMMARY
from .guard import Guard, worse_line
from .held_out import HeldOut, is_out_of_patience, load_evaluations
from .pause import PauseRules, SystemSensors, wait_while_paused
from .plan import adapters_line, basis_lines, kill_revive_lines, run_line
from .run_file import DataDigest, RunFile, load_run_file, save_run_file, versions
from .saving import AdapterSaver
from .stop import StopRequest
from .watcher import RunWatcher, Watchers


@dataclass(frozen=True)
class TrainRun:
    """What to run, and with what.

    Attributes:
        config: all settings.
        dataset, eval_dataset: as ``resolve`` gives them.
        init: an adapter to start from.
        resume: whether it goes on from the last checkpoint.
        cache_key: what hidden states that are kept are encrypted with.
        recorder: keeps what crosses, and the truth beside it.
        watchers: who follow the run; spans: what happens when, where one of them wants to know.
    """

    bundle: Bundle
    config: Resolved
    dataset: Dataset
    eval_dataset: Dataset | None = None
    init: LoadedAdapter | None = None
    resume: bool = False
    credentials: Credentials = field(default_factory=Credentials)
    device_id: str = ""
    cache_key: CacheKey | None = None
    recorder: Recorder | None = None
    watchers: Sequence[RunWatcher] = ()
    spans: Spans = field(default_factory=Spans)

    @property
    def out(self) -> Path:
        """Its directory."""
        assert self.config.saving.out is not None
        return self.config.saving.out

    @property
    def cache_mb(self) -> float:
        """Disk for hidden states."""
        return self.config.placement.cache_mb or 0.0


def train(run: TrainRun, display: Display) -> dict[str, Any]:
    """Train to the end and save the adapter; returns the summary that is also in ``summary.json``.

    Raises any ``DloraError``; ``StoppedError`` after the first Ctrl-C, SIGTERM or SIGHUP, with the step under way
    finished and saved. A second Ctrl-C stops at once; the last checkpoint stands.
    """
    # While an interrupt ends us at once: libraries take it for faults of their own.
    load_libraries(run.bundle, run.config.device.engine)
    with interrupts.raise_on_signal(), run_directory(run.out), locked(run.out), _telling_what_is_saved(run.out):
        return _train(run, display)


@contextlib.contextmanager
def _telling_what_is_saved(out: Path) -> Iterator[None]:
    """Where writing fails, or Ctrl-C ends all at once: what is left to go on from, where something is."""
    try:
        yield
    except (StorageError, KeyboardInterrupt) as error:
        saved = list_checkpoints(out / CHECKPOINTS)
        if not saved:
            raise
        kept = f"what was saved at step {saved[0][0]:,} is intact: go on with dlora-edge resume {out}"
        if isinstance(error, StorageError):
            raise StorageError(f"{error}; {kept}") from error.__cause__
        raise StoppedError(f"{interrupts.INTERRUPTED}; {kept}") from None


def _train(run: TrainRun, display: Display) -> dict[str, Any]:
    checkpoint = find_checkpoint(run.out, resume=run.resume, warn=display.warn)
    fits_held_outputs = run.config.keeps_outputs
    run = replace(run, config=_complete_config(run, checkpoint))
    if run.config.keeps_outputs and not fits_held_outputs:
        display.warn(
            "--cache-mb is too little for what this run keeps: its bits want that anyway, and its steps take longer"
        )
    first_step = checkpoint.step if checkpoint else 0
    earlier = load_evaluations(run.out, run.eval_dataset, first_step, display.warn)
    # Before anything is asked of a server: none is needed for that.
    finished = _summary_of_finished_run(run, first_step, earlier)
    if finished is not None:
        _remove_caches(run)
        display.warn(_finished_text(run, first_step, is_worse=finished["is_worse"]))
        return finished
    _print_plan(run, first_step, display)
    if checkpoint is None:
        _forget_other_texts(run)
    if run.recorder is not None:
        for dataset in (run.dataset, *([run.eval_dataset] if run.eval_dataset is not None else [])):
            run.recorder.add_examples((example.ids, example.label_positions) for example in dataset)
    engine = make_engine(run.bundle, run.config.device.engine, run.config.device.threads)
    started = time.perf_counter()
    stop = StopRequest()
    connecting = _connect_settings(run, checkpoint, display, stop.is_requested)
    with contextlib.ExitStack() as opened:
        with _nothing_kept_if_stopped(checkpoint):
            blocks = opened.enter_context(open_blocks(
                run.bundle, engine, run.config, run.out, key=run.cache_key, is_new=checkpoint is None,
                connecting=connecting, warn=display.warn,
            ))  # fmt: skip
        opened.enter_context(stop.stop_on_signal())
        with _setting_up(display, stop.is_requested, checkpoint) as before_set_up:
            trainer = Trainer(
                run.bundle, engine, blocks.make_side, run.config, run.dataset, init=run.init, checkpoint=checkpoint,
                before_set_up=before_set_up,
            )  # fmt: skip
        trainer.spans, crossed = run.spans, trainer.side.crossed  # without a connection, too
        _save_run_file(run, crossed.welcome)  # before texts are asked for, so that what has come belongs to a run
        if run.eval_dataset is not None:
            trainer.side.check(int(run.eval_dataset.lengths.max()))
        if blocks.cached is not None:
            # Texts that come in packs come in those of the whole part, whatever of it is still to do.
            steps = range(run.config.part_begins, run.config.total_steps)
            datasets = [run.dataset, *([run.eval_dataset] if run.eval_dataset is not None else [])]
            fill_cache(blocks.cached, trainer.batches, steps, datasets, display, stop.is_requested)
            _save_run_file(run, crossed.welcome)
        if run.config.optimizer.lr is None:
            run = _with_found_rate(run, trainer, display, stop.is_requested)
            _save_run_file(run, crossed.welcome)
        set_up = trainer.traffic
        kept_bytes = None if blocks.cached is None else blocks.cached.kept_bytes
        saver = AdapterSaver(trainer, run.dataset, earlier, kept_bytes)
        watchers = Watchers(run.watchers, display.warn)
        held_out = HeldOut(
            run.out, run.eval_dataset, earlier, every=run.config.evaluate_every,
            patience=run.config.saving.patience, trainer=trainer, saver=saver, display=display, watchers=watchers,
            should_stop=stop.is_requested,
        )  # fmt: skip
        guard = Guard(earlier, has_held_out=run.eval_dataset is not None)
        with watchers.following(first_step):
            if first_step == 0:
                if run.init is not None:
                    _warn_of_dropped_modules(trainer, run.init, display)
                held_out.add("before")
            with MetricsLog(run.out / METRICS, first_step) as log:
                evaluations = _evaluations(run)
                left = partial(evaluations.count_left, total_steps=run.config.total_steps) if evaluations else None
                with display.training(run.config.total_steps, first_step, left, _blocks(run)):
                    for metrics in iterate_metrics(run.out / METRICS):
                        display.add_to_map(metrics)
                        saver.add(metrics)
                        guard.losses.add(metrics.loss)
                    _run_steps(run, trainer, saver, display, log, held_out, guard, watchers, stop.is_requested, set_up)
            trained_s = time.perf_counter() - started
            if not held_out.is_done():
                held_out.add("after")
            saver.save(run.out)
            worsening, saved_step = guard.worsening, trainer.next_step
            if run.config.saving.keep == "best" or (run.config.saving.keep == "auto" and worsening is not None):
                saved_step = held_out.keep_best()
            if worsening is not None:
                display.warn(worse_line(worsening, trainer.peak_rate))
            summary = _summary(run, trainer.next_step, held_out) | {
                "first_step": first_step,
                "reconnects": crossed.reconnects,
                "sessions_resumed": crossed.resumed,
                "steps_rerun": trainer.steps_rerun,
                "eval_bytes_up": held_out.bytes_up,
                "eval_bytes_down": held_out.bytes_down,
                "is_worse": worsening is not None,
                "saved_step": saved_step,
                "wall_s": round(trained_s, 3),
            }
            write_atomically(run.out / SUMMARY, json.dumps(summary, indent=1).encode() + b"\n")
    _remove_caches(run)
    return summary


@contextlib.contextmanager
def _setting_up(
    display: Display, stop: Callable[[], bool], checkpoint: Checkpoint | None
) -> Iterator[Callable[[SetUpPiece, int, int], None]]:
    """Show inside what comes before the first step; what it yields is called before each piece of that, and ends the
    run there where it is to stop."""
    with display.setting_up() as show, _nothing_kept_if_stopped(checkpoint):

        def before_set_up(piece: SetUpPiece, done: int, total: int) -> None:
            if stop():
                raise StoppedError("stopped")
            show(piece, done, total)

        yield before_set_up


@contextlib.contextmanager
def _nothing_kept_if_stopped(checkpoint: Checkpoint | None) -> Iterator[None]:
    """A run that is stopped within has saved nothing, or nothing since ``checkpoint``."""
    try:
        yield
    except StoppedError:
        if checkpoint is None:
            text = "stopped before the first step: nothing is kept; the same command begins anew"
        else:
            text = f"stopped; what was saved at step {checkpoint.step} is intact; go on with dlora-edge resume"
        raise StoppedError(text) from None


def _remove_caches(run: TrainRun) -> None:
    """Of a run that is done."""
    remove_quietly(run.out / KEPT_OUTPUTS)
    if not run.config.placement.keep_cache:
        remove_quietly(run.out / CACHE)


def _forget_other_texts(run: TrainRun) -> None:
    """Remove what was kept for a run that came to nothing, where this one would not make it again bit for bit: of other
    data, or of a part of them."""
    remove_quietly(run.out / KEPT_OUTPUTS)
    with contextlib.suppress(CheckpointError):
        begun = load_run_file(run.out)
        evaluated = None if run.eval_dataset is None else DataDigest.of(run.eval_dataset)
        is_whole = run.config.total_steps * run.config.examples_a_step >= len(run.dataset)
        if is_whole and (begun.data, begun.eval_data) == (DataDigest.of(run.dataset), evaluated):
            return
    remove_quietly(run.out / CACHE)


def _with_found_rate(run: TrainRun, trainer: Trainer, display: Display, stop: Callable[[], bool]) -> TrainRun:
    """The run with the learning rate that ``trainer`` finds, which its file has from now on."""
    with _setting_up(display, stop, None) as before_set_up:
        found = trainer.find_rate(partial(before_set_up, "rate"))
    display.say(
        f"learning rate {found.lr:g}: the first update was tried in {found.tries} sizes, and {found.size:.2g} does "
        "best on the next examples (--lr)"
    )
    return replace(run, config=trainer.config)


def _complete_config(run: TrainRun, checkpoint: Checkpoint | None) -> Resolved:
    """The run's settings with all that was left open: from the run that it goes on with, or drawn.

    Raises ``CheckpointError`` or ``UsageError`` where it cannot go on with that one.
    """
    if checkpoint is None:
        return run.config if run.config.seed else msgspec.structs.replace(run.config, seed=draw_seed())
    state = trainer_state(checkpoint)
    config = continued(run.config, state.run, checkpoint.step, run.out)
    check_identity(RunIdentity.of(config, run.bundle.manifest, run.dataset.fingerprint), state.run, run.out)
    return config


def _print_plan(run: TrainRun, first_step: int, display: Display) -> None:
    manifest, has_state = run.bundle.manifest, first_step > 0 or run.init is not None
    line = run_line(
        run.config, manifest, run.dataset, _evaluations(run), first_step, has_state=has_state, cache_mb=run.cache_mb
    )
    display.say(line)
    display.say(adapters_line(run.config, manifest))
    if not has_state:
        for line in basis_lines(run.config, run.dataset):
            display.say(line)
    for line in kill_revive_lines(run.config, run.config.groups(manifest)):
        display.say(line)


def _blocks(run: TrainRun) -> list[int] | None:
    """The number of each unit in the base model, where units are blocks."""
    if run.config.units.unit != "block":
        return None
    return sorted({group.block for group in run.config.groups(run.bundle.manifest)})


def _evaluations(run: TrainRun) -> EvaluationPlan | None:
    return None if run.eval_dataset is None else EvaluationPlan(run.eval_dataset, run.config.evaluate_every)


def _save_run_file(run: TrainRun, server: Welcome | None) -> None:
    """``server``: what it said of itself; where none was asked yet, a run that goes on keeps what it knew."""
    file = _run_file(run, server)
    if server is None and run.resume:
        with contextlib.suppress(CheckpointError):
            file = msgspec.structs.replace(file, server=load_run_file(run.out).server)
    save_run_file(run.out, file)


def _run_file(run: TrainRun, server: Welcome | None) -> RunFile:
    base = run.bundle.manifest.base_model
    blocks = _blocks(run)
    return RunFile(
        settings=run.config.as_settings(),
        data=DataDigest.of(run.dataset),
        eval_data=None if run.eval_dataset is None else DataDigest.of(run.eval_dataset),
        base_model={"name": base.name, "fingerprint": base.fingerprint},
        invocation=run.config.invocation,
        versions=versions(),
        server=None if server is None else {"software": server.software, "wire": server.protocol_version},
        blocks=None if blocks is None else tuple(blocks),
    )


def _summary_of_finished_run(
    run: TrainRun, steps: int, evaluations: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """The summary of a run that was summed up before: one that is resumed again would lose its times."""
    try:
        summary: dict[str, Any] = json.loads(read_regular(run.out / SUMMARY))
        # All that is asked of it later.
        summed_up, is_worse, _ = summary["steps"], summary["is_worse"], summary["saved_step"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    if summed_up != steps:  # another's, where the run was made longer since
        return None
    is_finished = (
        steps == run.config.total_steps
        or is_out_of_patience(evaluations, run.config.saving.patience, run.config.part_begins)
        or (is_worse and run.config.saving.on_worse == "stop")
    )
    return summary if is_finished else None


def _finished_text(run: TrainRun, steps: int, *, is_worse: bool) -> str:
    if steps == run.config.total_steps:
        reason = f"all of its {steps:,} steps are done, and a larger --steps goes on"
    elif is_worse and run.config.saving.on_worse == "stop":
        total = run.config.total_steps
        reason = f"--on-worse stop ended it at step {steps:,} of {total:,}, and --on-worse warn goes on"
    else:
        reason = f"--patience ended it at step {steps:,} of {run.config.total_steps:,}, and a larger one goes on"
    return f"this run is finished: {reason}; nothing was changed"


def _connect_settings(
    run: TrainRun, checkpoint: Checkpoint | None, display: Display, stop: Callable[[], bool]
) -> ConnectSettings:
    """A run that has begun, in this process or an earlier one, does not end because its server is away."""
    at_start = checkpoint is not None or bool(run.config.server.max_retry_s)
    return ConnectSettings(
        credentials=run.credentials,
        device_id=run.device_id,
        retry=Retry(max_s=run.config.server.max_retry_s, at_start=at_start),
        liveness=Liveness(exchange_s=run.config.server.exchange_timeout_s),
        say=display.warn,
        should_stop=stop,
        recorder=run.recorder,
        spans=run.spans,
    )


def _run_steps(
    run: TrainRun,
    trainer: Trainer,
    saver: AdapterSaver,
    display: Display,
    log: MetricsLog,
    held_out: HeldOut,
    guard: Guard,
    watchers: Watchers,
    stop: Callable[[], bool],
    set_up: tuple[int, int],
) -> None:
    """Step to the end; save and evaluate on the way. ``set_up``: bytes up and down of before."""
    last = run.config.total_steps
    sensors = SystemSensors()
    pause = PauseRules.parse(run.config.device.pause_when)
    if warning := pause.warning(sensors):
        display.warn(warning)

    def save() -> None:
        trainer.save_checkpoint(run.out / CHECKPOINTS)
        saver.save(run.out)
        watchers.saved()

    while trainer.next_step < last:
        if held_out.is_due() and not stop():
            # Whoever stops it stops the run, below, with all that is saved there.
            with _save_on_error(run, trainer), contextlib.suppress(StoppedError):
                held_out.add(f"at step {trainer.next_step}")
        if worsening := guard.has_worsened():
            if run.config.saving.on_worse == "stop":
                display.say(f"ended at step {trainer.next_step}, for --on-worse stop: {worsening}")
                save()
                return
            display.warn(worse_line(worsening, trainer.peak_rate))
        if held_out.is_out_of_patience():
            patience = run.config.saving.patience
            display.say(f"ended at step {trainer.next_step}: {patience} evaluations in a row were no better")
            save()
            return
        paused = time.perf_counter()
        has_paused = wait_while_paused(pause, sensors, say=display.say, should_stop=stop, on_pause=save)
        paused_s = time.perf_counter() - paused if has_paused else 0.0
        if stop():
            save()
            raise StoppedError(f"stopped after step {trainer.next_step}; go on with dlora-edge resume {run.out}")
        with _save_on_error(run, trainer):
            metrics = replace(
                trainer.run_step(), paused_s=paused_s, set_up_bytes_up=set_up[0], set_up_bytes_down=set_up[1]
            )
        set_up = (0, 0)
        log.write(metrics)
        saver.add(metrics)
        guard.losses.add(metrics.loss)
        display.step(metrics)
        watchers.step(metrics)
        done = trainer.next_step
        if done % run.config.saving.save_every == 0 or done == last:
            save()


@contextlib.contextmanager
def _save_on_error(run: TrainRun, trainer: Trainer) -> Iterator[None]:
    """Where there is no server, or no more of it, save a checkpoint: that needs none."""
    try:
        yield
    except DloraError:
        if trainer.next_step > 0:
            trainer.save_checkpoint(run.out / CHECKPOINTS)
        raise


def _warn_of_dropped_modules(trainer: Trainer, init: LoadedAdapter, display: Display) -> None:
    """An adapter to start from may have modules in units that are killed from step 0 on."""
    adapters = trainer.adapters
    killed = {group for unit in adapters.units if unit.state is UnitState.KILLED for group in unit.groups}
    dropped = sum(target.name in init.modules for group in killed for target in adapters.group_specs[group].targets)
    if dropped:
        display.warn(
            f"{dropped} of the {len(init.modules)} modules of --init-adapter belong to units that are not active: "
            "they are left out, also of what is saved (--active-fraction 1 keeps all)"
        )


_TOTALS: Final = ("tokens", "labelled", "bytes_up", "bytes_down", "set_up_bytes_up", "set_up_bytes_down", "round_trips")


def _summary(run: TrainRun, steps: int, held_out: HeldOut) -> dict[str, Any]:
    """The whole run, what came before a resumption included."""
    rows = read_metrics(run.out / METRICS)
    totals = {
        name: sum(getattr(row, name) for row in rows)
        for name in _TOTALS
    }
    for way in ("up", "down"):
        totals[f"bytes_{way}"] += totals[f"set_up_bytes_{way}"]
    losses = {row["step"]: row["loss"] for row in held_out.evaluations}
    best = held_out.best
    return {
        "steps": steps,
        "eval_loss_before": losses.get(0),
        "eval_loss_after": losses.get(steps),
        "eval_loss_best": best and best["loss"],
        "best_step": best and best["step"],
        "keep": run.config.saving.keep,
        "evaluations": held_out.evaluations,
        **totals,
        "edge_compute_s": round(sum(row.edge_compute_s for row in rows), 3),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "torch_loaded": "torch" in sys.modules,
        "adapter_dir": str(run.out),
    }
