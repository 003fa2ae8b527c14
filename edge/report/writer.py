"""Keeps ``report.html`` in a run's directory while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dlora.edge.files import write_atomically
from dlora.edge.run.file_names import REPORT
from dlora.edge.run.watcher import RunWatcher
from dlora.edge.training.metrics import StepMetrics
from dlora.protocol.errors import CheckpointError

MOST_OF_THE_TIME: Final = 0.01
"""The share of a run's time that may go into its page before it ends."""


class ReportWriter(RunWatcher):
    """A watcher of a run: its page is there after the first step, made again when the run saves, and when it ends.

    Not at every save of a long run: what making it took last is at most ``MOST_OF_THE_TIME`` of what has passed since.
    """

    def __init__(self, out: Path, warn: Callable[[str], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._out = out
        self._warn = warn
        self._clock = clock
        self._took_s = 0.0
        self._made_at: float | None = None

    def step(self, metrics: StepMetrics) -> None:
        if self._made_at is None:
            self._write()

    def saved(self) -> None:
        if self._made_at is None or self._took_s <= MOST_OF_THE_TIME * (self._clock() - self._made_at):
            self._write()

    def end(self) -> None:
        self._write()

    def _write(self) -> None:
        """Raises ``StorageError``. A file of the run that cannot be read is worth a line, and not the run."""
        from .page import run_page  # what makes pages is loaded for the first one

        began = self._clock()
        try:
            content = run_page(self._out)
        except CheckpointError as error:
            self._warn(f"no {REPORT}: {error}")
        else:
            write_atomically(self._out / REPORT, content)
        self._made_at = self._clock()
        self._took_s = self._made_at - began
