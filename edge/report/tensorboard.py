"""Follows a run into TensorBoard's event files, beside its other files."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import msgspec

from dlora.edge.files import make_directory, storage_errors
from dlora.edge.run.file_names import EVALUATIONS, METRICS, TENSORBOARD
from dlora.edge.run.watcher import RunWatcher
from dlora.edge.training.metrics import StepMetrics, iterate_metrics

from .event_file import EventFile
from .run_data import EvaluationLine, read_evaluations
from .time_split import split_of

_PREFIX: Final = "events.out.tfevents."
_SUFFIX: Final = ".dlora"  # where others put a name of the machine


class TensorboardWriter(RunWatcher):
    """A watcher of a run: a scalar for each number of a step, and of an evaluation.

    A run that goes on has one file again, made anew from ``metrics.jsonl``: no step is there twice, whoever reads it.

    Args:
        now: seconds since 1970; None: by the wall clock as it is here, and from then on by one that never jumps, for
            points whose times go back make no curve.
    """

    def __init__(self, out: Path, now: Callable[[], float] | None = None) -> None:
        began, since = time.time(), time.monotonic()
        self._out = out
        self._now = now or (lambda: began + (time.monotonic() - since))
        self._file: EventFile | None = None

    def begin(self, first_step: int) -> None:
        directory, now = self._out / TENSORBOARD, self._now()
        make_directory(directory)
        for path in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
            with storage_errors(path):
                path.unlink()
        self._file = EventFile(directory / f"{_PREFIX}{int(now)}{_SUFFIX}", now)
        if first_step:
            self._add_earlier(first_step, now)

    def step(self, metrics: StepMetrics) -> None:
        self._add_step(metrics, self._now())

    def evaluation(self, row: dict[str, Any]) -> None:
        self._add_evaluation(msgspec.convert(row, EvaluationLine), self._now())

    def end(self) -> None:
        if self._file is not None:
            self._file.close()

    def _add_earlier(self, first_step: int, now: float) -> None:
        """What was before a resumption, as if its steps had followed one another until now."""
        evaluations = {each.step: each for each in read_evaluations(self._out / EVALUATIONS)}
        steps = self._out / METRICS
        at = now - sum(_duration(each) for each in iterate_metrics(steps) if each.step < first_step)
        for metrics in iterate_metrics(steps):
            if metrics.step >= first_step:  # of a run that went on past its last checkpoint
                break
            if found := evaluations.pop(metrics.step, None):
                self._add_evaluation(found, at)
            at += _duration(metrics)
            self._add_step(metrics, at)
        if found := evaluations.get(first_step):
            self._add_evaluation(found, at)

    def _add_step(self, metrics: StepMetrics, wall_time: float) -> None:
        assert self._file is not None
        scalars: dict[str, float] = {
            "loss": metrics.loss,
            "learning_rate": metrics.learning_rate,
            "grad_norm": metrics.grad_norm,
            "tokens": metrics.tokens,
            "tokens_per_s": metrics.tokens / metrics.step_s,
            "active_units": metrics.active_units,
            "live_units": metrics.live_units,
            "round_trips": metrics.round_trips,
            "peak_rss_mb": metrics.peak_rss_mb,
            "bytes_up": metrics.bytes_up,
            "bytes_down": metrics.bytes_down,
            **{f"bytes_up/{role}": size for role, size in metrics.up.items()},
            **{f"bytes_down/{role}": size for role, size in metrics.down.items()},
            "step_s": metrics.step_s,
            **{f"step_s/{name}": spent for name, spent in asdict(split_of(metrics)).items()},
        }
        self._file.add(metrics.step, scalars, wall_time)

    def _add_evaluation(self, line: EvaluationLine, at: float) -> None:
        assert self._file is not None
        scalars = {f"eval_{name}": getattr(line, name) for name in ("loss", "token_accuracy", "exact_match")}
        self._file.add(line.step, scalars, at)


def _duration(metrics: StepMetrics) -> float:
    return metrics.step_s + metrics.paused_s
