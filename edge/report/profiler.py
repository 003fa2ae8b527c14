"""Follows a run and profiles some of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dlora.edge.files import write_atomically
from dlora.edge.run.watcher import RunWatcher
from dlora.edge.training.metrics import StepMetrics
from dlora.edge.wire.spans import Spans

WARM_UP_STEPS: Final = 3


class Profiler(RunWatcher):
    """A watcher of a run: takes what happens in ``steps`` steps after a few, and writes it when they are done, or the
    run ends before."""

    def __init__(self, path: Path, spans: Spans, steps: int) -> None:
        self._path = path
        self._spans = spans
        self._steps = steps
        self._done = 0

    def step(self, metrics: StepMetrics) -> None:
        self._done += 1
        if self._done == WARM_UP_STEPS:
            self._spans.is_on = True
        elif self._done == WARM_UP_STEPS + self._steps:
            self._write()

    def end(self) -> None:
        if self._done < WARM_UP_STEPS + self._steps:
            self._write()

    def _write(self) -> None:
        from .trace import trace

        self._spans.is_on = False
        write_atomically(self._path, trace(self._spans))
        self._spans.device.clear()
        self._spans.server.clear()
