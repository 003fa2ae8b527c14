"""A whole training run: start or resume, step, evaluate, save, stop when asked, and sum up."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from dlora.protocol.errors import StoppedError, UsageError

from .bundle import Bundle
from .checkpoint import load_latest
from .config import TrainConfig
from .connection import Connection
from .data import Dataset
from .memory import peak_rss_mb
from .onnx_engine import OnnxEngine
from .peft_adapter import load_adapter
from .report import MetricsLog, Reporter
from .trainer import Evaluation, Trainer

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class TrainRun:
    """What to run, and where to keep it."""

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


def train(run: TrainRun, reporter: Reporter) -> dict[str, Any]:
    """Train to the end and save the adapter; returns the summary that is also in ``summary.json``.

    Raises any ``DloraError``; ``StoppedError`` after the first Ctrl-C or SIGTERM, with the step under way
    finished and saved. A second Ctrl-C stops at once; the last checkpoint stands.
    """
    checkpoint = None
    if run.resume:
        checkpoint = load_latest(run.out / CHECKPOINTS, warn=reporter.warn)
        if checkpoint is None:
            reporter.warn(f"no checkpoint in {run.out}: starting from step 0")
    elif (run.out / CHECKPOINTS).exists() and any((run.out / CHECKPOINTS).glob("checkpoint-*.safetensors")):
        raise UsageError(f"{run.out} holds a run already; go on with --resume, or choose another --out")
    init = load_adapter(run.init_adapter) if run.init_adapter else None
    run.out.mkdir(parents=True, exist_ok=True)
    engine = OnnxEngine(run.bundle, run.threads)
    started = time.perf_counter()
    with Connection(run.server) as connection, _asked_to_stop() as stop:
        trainer = Trainer(
            run.bundle, engine, connection, run.config, run.dataset, init=init, checkpoint=checkpoint
        )
        first_step = trainer.next_step
        if first_step >= run.config.total_steps and checkpoint is None:
            raise UsageError("nothing to do: --steps is 0")
        log = MetricsLog(run.out / METRICS, first_step)
        before = _evaluate(run, trainer, reporter, "before") if first_step == 0 else None
        evaluations = [] if before is None else [{"step": 0, **asdict(before)}]
        totals = {"tokens": 0, "labelled": 0, "bytes_up": 0, "bytes_down": 0, "round_trips": 0}
        edge_compute_s = 0.0
        with reporter.training(run.config.total_steps, first_step), log:
            while trainer.next_step < run.config.total_steps:
                metrics = trainer.run_step()
                log.write(metrics)
                reporter.step(metrics)
                for name in totals:
                    totals[name] += getattr(metrics, name)
                edge_compute_s += metrics.edge_compute_s
                done = trainer.next_step
                stopping = stop() and done < run.config.total_steps
                if stopping or done % run.save_every == 0 or done == run.config.total_steps:
                    trainer.save_checkpoint(run.out / CHECKPOINTS)
                    trainer.save_adapter(run.out)
                if stopping:
                    raise StoppedError(f"stopped after step {done}; go on with --resume")
                if run.eval_every and done % run.eval_every == 0 and done < run.config.total_steps:
                    middle = _evaluate(run, trainer, reporter, f"at step {done}")
                    evaluations += [] if middle is None else [{"step": done, **asdict(middle)}]
        trained_s = time.perf_counter() - started
        after = _evaluate(run, trainer, reporter, "after")
        evaluations += [] if after is None else [{"step": run.config.total_steps, **asdict(after)}]
        trainer.save_adapter(run.out)
        return {
            "steps": run.config.total_steps,
            "first_step": first_step,
            "wall_s": round(trained_s, 3),
            "eval_loss_before": before.loss if before else None,
            "eval_loss_after": after.loss if after else None,
            "evaluations": evaluations,
            **totals,
            "edge_compute_s": round(edge_compute_s, 3),
            "peak_rss_mb": round(peak_rss_mb(), 1),
            "torch_loaded": "torch" in sys.modules,
            "adapter_dir": str(run.out),
        }


def _evaluate(run: TrainRun, trainer: Trainer, reporter: Reporter, when: str) -> Evaluation | None:
    if run.eval_dataset is None:
        return None
    with reporter.evaluating(when, len(run.eval_dataset)) as advance:
        result = trainer.evaluate(run.eval_dataset, lambda done, _: advance(done))
    reporter.say(
        f"held-out loss {when}: {result.loss:.4f} over {result.tokens} tokens, "
        f"{result.token_accuracy:.1%} of tokens right"
    )
    return result


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGINT or SIGTERM asks to stop after the step, and the second one interrupts."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: asked
        return
    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def total_steps(dataset: Dataset, *, epochs: float, steps: int | None, batch_size: int, grad_accum: int) -> int:
    """How many optimizer steps a run has."""
    if steps is not None:
        return steps
    per_epoch = -(-len(dataset) // (batch_size * grad_accum))
    return max(1, int(np.ceil(epochs * per_epoch)))
