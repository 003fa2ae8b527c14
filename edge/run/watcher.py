"""Who follows a run as it goes, to show it elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from dlora.edge.training.metrics import StepMetrics
from dlora.protocol.errors import DloraError, StorageError


class RunWatcher:
    """Is told of a run, in this order: a kind of watcher overrides what it needs. One that cannot write raises
    ``StorageError`` and is told no more."""

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
    """Tells each of them. A page or a curve is not worth a run: who cannot write is worth a line, and the run goes on.

    Args:
        warn: called with that line.
    """

    def __init__(self, watchers: Sequence[RunWatcher], warn: Callable[[str], None]) -> None:
        self._watchers = list(watchers)
        self._warn = warn

    def step(self, metrics: StepMetrics) -> None:
        self._tell(lambda watcher: watcher.step(metrics))

    def evaluation(self, row: dict[str, Any]) -> None:
        self._tell(lambda watcher: watcher.evaluation(row))

    def saved(self) -> None:
        self._tell(lambda watcher: watcher.saved())

    @contextmanager
    def following(self, first_step: int) -> Iterator[None]:
        """Within, the run goes on. An error that ends it is raised, whatever else cannot be written then."""
        self._tell(lambda watcher: watcher.begin(first_step))
        try:
            yield
        except (DloraError, KeyboardInterrupt):
            for watcher in self._watchers:
                with suppress(StorageError):
                    watcher.end()
            raise
        self._tell(lambda watcher: watcher.end())

    def _tell(self, tell: Callable[[RunWatcher], None]) -> None:
        for watcher in tuple(self._watchers):
            try:
                tell(watcher)
            except StorageError as error:
                self._watchers.remove(watcher)
                self._warn(f"{error}; the run goes on without")
