"""Who follows a run as it goes, to show it elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from dlora.edge.training.metrics import StepMetrics
from dlora.protocol.errors import DloraError, StorageError


class RunWatcher(Protocol):
    """What is told of a run, in this order; what it raises ends the run, as any output that cannot be written."""

    def begin(self, first_step: int) -> None:
        """The run begins, or goes on, at ``first_step``; what ``metrics.jsonl`` has of later steps will go."""

    def step(self, metrics: StepMetrics) -> None:
        """A step is done, and in ``metrics.jsonl``."""

    def evaluation(self, row: dict[str, Any]) -> None:
        """An evaluation is done, and in ``evaluations.jsonl``."""

    def saved(self) -> None:
        """A checkpoint and the adapter were saved."""

    def end(self) -> None:
        """The run ends here, for now or for good; all of its files are written."""


class Watchers:
    """Tells each of them."""

    def __init__(self, watchers: Sequence[RunWatcher]) -> None:
        self._watchers = watchers

    def step(self, metrics: StepMetrics) -> None:
        for watcher in self._watchers:
            watcher.step(metrics)

    def evaluation(self, row: dict[str, Any]) -> None:
        for watcher in self._watchers:
            watcher.evaluation(row)

    def saved(self) -> None:
        for watcher in self._watchers:
            watcher.saved()

    @contextmanager
    def following(self, first_step: int) -> Iterator[None]:
        """Within, the run goes on. An error that ends it is raised, whatever else cannot be written then."""
        for watcher in self._watchers:
            watcher.begin(first_step)
        try:
            yield
        except (DloraError, KeyboardInterrupt):
            for watcher in self._watchers:
                with suppress(StorageError):
                    watcher.end()
            raise
        for watcher in self._watchers:
            watcher.end()
