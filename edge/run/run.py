"""A whole training run: start or resume, step, evaluate, save, stop when asked, and sum up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from dlora.edge.engine.choose import load_libraries, make_engine
from dlora.edge.files import locked
from dlora.edge.seeds import draw_seed
from dlora.edge.training.checkpoint import Checkpoint, list_checkpoints
from dlora.edge.training.resolve import with_kept_reads
from dlora.edge.training.resolved import Resolved, RunIdentity, check_identity, continued
from dlora.edge.training.trainer import SetUpPiece, Trainer
from dlora.edge.training.trainer_state import trainer_state
from dlora.edge.wire.connecting import ConnectSettings
from dlora.protocol import interrupts
from dlora.protocol.errors import StoppedError, StorageError

from .blocks import RunBlocks, fill_cache, forget_other_texts, open_blocks, remove_caches
from .directory import CHECKPOINTS, find_checkpoint, run_directory
from .display import Display
from .held_out import load_evaluations
from .plan import plan_lines
from .run_file import RunFile, save_run_file
from .steps import RunSteps
from .stop import StopRequest
from .summary import finished_line, finished_summary
from .train_run import TrainRun


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
    config = _complete_config(run, checkpoint)
    if config.keeps_outputs and not run.config.keeps_outputs:
        display.warn(
            "--cache-mb is too little for what this run keeps: its bits want that anyway, and its steps take longer"
        )
    if config.part_begins:  # what is kept must last for two epochs of this part
        config = with_kept_reads(config, run.bundle.manifest, run.dataset)
    if run.recorder is not None:  # which is to have all that a server is told
        config = msgspec.structs.replace(config, keeps_reads=False)
    run = replace(run, config=config)
    first_step = checkpoint.step if checkpoint else 0
    evaluations = load_evaluations(run.out, run.eval_dataset, first_step, display.warn)
    # Before anything is asked of a server: none is needed for that.
    finished = finished_summary(config, first_step, evaluations)
    if finished is not None:
        remove_caches(config)
        display.warn(finished_line(config, first_step, is_worse=finished["is_worse"]))
        return finished
    has_state = first_step > 0 or run.init is not None
    for line in plan_lines(config, run.bundle.manifest, run.datasets, first_step, has_state=has_state):
        display.say(line)
    if checkpoint is None:
        forget_other_texts(config, *run.datasets)
    if run.recorder is not None:
        for dataset in run.datasets:
            run.recorder.add_examples((example.ids, example.label_positions) for example in dataset)
    engine = make_engine(run.bundle, config.device.engine, config.device.threads)
    started = time.perf_counter()
    stop = StopRequest()
    connecting = _connect_settings(run, display, stop.is_requested, has_begun=checkpoint is not None)
    with contextlib.ExitStack() as opened:
        with _nothing_kept_if_stopped(checkpoint):
            blocks = opened.enter_context(open_blocks(
                run.bundle, engine, config, run.out, key=run.cache_key, is_new=checkpoint is None,
                connecting=connecting, warn=display.warn,
            ))  # fmt: skip
        opened.enter_context(stop.stop_on_signal())
        with _setting_up(display, stop.is_requested, checkpoint) as before_set_up:
            trainer = Trainer(
                run.bundle, engine, blocks.make_side, config, run.dataset, init=run.init, checkpoint=checkpoint,
                before_set_up=before_set_up,
            )  # fmt: skip
        trainer.spans = run.spans  # without a connection, too
        _prepare(run, trainer, blocks, display, stop.is_requested)
        kept_bytes = None if blocks.cached is None else blocks.cached.kept_bytes
        summary = RunSteps(run, trainer, evaluations, kept_bytes, display, stop.is_requested).run(first_step, started)
    remove_caches(config)
    return summary


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


def _connect_settings(
    run: TrainRun, display: Display, should_stop: Callable[[], bool], *, has_begun: bool
) -> ConnectSettings:
    """A run that has begun, in this process or an earlier one, does not end because its server is away; nor does one
    whose server was there when it was looked for."""
    return replace(
        run.connecting,
        retry=replace(run.connecting.retry, at_start=run.connecting.retry.at_start or has_begun),
        say=display.warn,
        should_stop=should_stop,
        recorder=run.recorder,
        spans=run.spans,
    )


@contextlib.contextmanager
def _setting_up(
    display: Display, should_stop: Callable[[], bool], checkpoint: Checkpoint | None
) -> Iterator[Callable[[SetUpPiece, int, int], None]]:
    """Show inside what comes before the first step; what it yields is called before each piece of that, and ends the
    run there where it is to stop."""
    with display.setting_up() as show, _nothing_kept_if_stopped(checkpoint):

        def before_set_up(piece: SetUpPiece, done: int, total: int) -> None:
            if should_stop():
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


def _prepare(
    run: TrainRun, trainer: Trainer, blocks: RunBlocks, display: Display, should_stop: Callable[[], bool]
) -> None:
    """Fill the cache and find the learning rate, where the run has a cache, and no rate."""
    _save_run_file(run, trainer)  # before texts are asked for, so that what has come belongs to a run
    if run.eval_dataset is not None:
        trainer.side.check(int(run.eval_dataset.lengths.max()))
    if blocks.cached is not None:
        # Texts that come in packs come in those of the whole part, whatever of it is still to do.
        steps = range(run.config.part_begins, run.config.total_steps)
        fill_cache(blocks.cached, trainer.batches, steps, run.datasets, display, should_stop)
        _save_run_file(run, trainer)
    if run.config.optimizer.lr is None:
        with _setting_up(display, should_stop, None) as before_set_up:
            found = trainer.find_rate(partial(before_set_up, "rate"))
        display.say(
            f"learning rate {found.lr:g}: the first update was tried in {found.tries} sizes, and {found.size:.2g} does "
            "best on the next examples (--lr)"
        )
        _save_run_file(run, trainer)


def _save_run_file(run: TrainRun, trainer: Trainer) -> None:
    manifest, server = run.bundle.manifest, trainer.side.crossed.welcome
    file = RunFile.of(trainer.config, manifest, run.dataset, run.eval_dataset, server)
    save_run_file(run.out, file, keeps_server=run.resume)
