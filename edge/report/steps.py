"""What ``metrics.jsonl`` comes to: sums over all steps, and the steps that are plotted. One pass, in little memory."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dlora.edge.run.guard import TrainingLosses
from dlora.edge.training.metrics import StepMetrics, iterate_metrics
from dlora.protocol.files import open_regular
from dlora.protocol.tensors import ByteArray

from .time_split import Split, split_of

MOST_PLOTTED: Final = 1000
_MEAN_SHARE: Final = 20  # the mean is of a twentieth of the run
_LONGEST_MEAN: Final = 200
_SHORTEST_MEAN: Final = 5


class Thinned:
    """The steps of one plot: all of them, or of each range of steps those with the least and the largest value.

    Args:
        range_steps: how many steps a range has; 1: all are plotted.
        value: by which they are chosen.

    Attributes:
        with_means: the steps that are kept, ascending, each with the mean of the losses before and at it.
    """

    def __init__(self, range_steps: int, value: Callable[[StepMetrics], float]) -> None:
        self.with_means: list[tuple[StepMetrics, float]] = []
        self._range_steps = range_steps
        self._value = value
        self._range: list[tuple[StepMetrics, float]] = []

    @property
    def kept(self) -> list[StepMetrics]:
        """The steps alone."""
        return [step for step, _ in self.with_means]

    def add(self, step: StepMetrics, mean: float) -> None:
        """The next step; ``mean``: of the losses up to it."""
        self._range.append((step, mean))
        if not self.with_means or len(self._range) == self._range_steps:
            self._close_range()

    def close(self) -> None:
        """There are no more; the last is kept."""
        if self._range:
            last = self._range[-1]
            self._close_range()
            if self.with_means[-1] is not last:
                self.with_means.append(last)

    def _close_range(self) -> None:
        least = min(self._range, key=lambda each: self._value(each[0]))
        most = max(self._range, key=lambda each: self._value(each[0]))
        first, second = sorted((least, most), key=lambda each: each[0].step)
        self.with_means += [first] if first is second else [first, second]
        self._range = []


@dataclass
class Steps:
    """All steps of a run.

    Attributes:
        count: of steps; total: that the run is to have.
        mean_of: how many losses a mean is of.
        by_loss, by_traffic, by_time: the steps that are plotted, chosen by what is plotted.
        up, down: bytes of the steps by role; bytes_up, bytes_down: of the steps and of setting up.
        set_up_bytes: up and down, that crossed before steps, at every start of the run.
        tokens, labelled, round_trips, step_s, paused_s: sums; peak_rss_mb: the largest.
        time: sums of what each step's time was spent on.
        losses: what says whether training makes the model worse, where there is no held-out data.
        states: of units, uint8 (units,), at each step that has others than the one before.
    """

    range_steps: int
    count: int = 0
    total: int = 0
    mean_of: int = 1
    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    bytes_up: int = 0
    bytes_down: int = 0
    set_up_bytes: int = 0
    tokens: int = 0
    labelled: int = 0
    round_trips: int = 0
    step_s: float = 0.0
    paused_s: float = 0.0
    peak_rss_mb: float = 0.0
    time: Split = field(default_factory=Split)
    states: list[tuple[int, ByteArray]] = field(default_factory=list)
    last: StepMetrics | None = None

    def __post_init__(self) -> None:
        self.by_loss = Thinned(self.range_steps, lambda step: step.loss)
        self.by_traffic = Thinned(self.range_steps, lambda step: step.bytes_up + step.bytes_down)
        self.by_time = Thinned(self.range_steps, lambda step: step.step_s)
        self.plotted = (self.by_loss, self.by_traffic, self.by_time)
        self.losses = TrainingLosses()
        self._window: deque[float] = deque()
        self._sum = 0.0

    @property
    def bytes(self) -> int:
        """Up and down."""
        return self.bytes_up + self.bytes_down

    @property
    def crossed(self) -> bool:
        """Whether any step asked a server for anything."""
        return self.bytes > self.set_up_bytes

    @property
    def is_thinned(self) -> bool:
        """Whether some steps are not plotted."""
        return self.range_steps > 1

    def add(self, step: StepMetrics) -> None:
        self.count += 1
        self.losses.add(step.loss)
        self.total = step.total_steps
        self.up.update(step.up)
        self.down.update(step.down)
        self.bytes_up += step.bytes_up + step.set_up_bytes_up
        self.bytes_down += step.bytes_down + step.set_up_bytes_down
        self.set_up_bytes += step.set_up_bytes_up + step.set_up_bytes_down
        self.tokens += step.tokens
        self.labelled += step.labelled
        self.round_trips += step.round_trips
        self.step_s += step.step_s
        self.paused_s += step.paused_s
        self.peak_rss_mb = max(self.peak_rss_mb, step.peak_rss_mb)
        self.time += split_of(step)
        if self.last is None or self.last.units != step.units:
            self.states.append((step.step, step.states))
        self.last = step
        mean = self._mean(step.loss)
        for plotted in self.plotted:
            plotted.add(step, mean)

    def _mean(self, loss: float) -> float:
        if not self._window:
            self.mean_of = min(max(self.total // _MEAN_SHARE, _SHORTEST_MEAN), _LONGEST_MEAN)
        self._window.append(loss)
        self._sum += loss
        if len(self._window) > self.mean_of:
            self._sum -= self._window.popleft()
        return self._sum / len(self._window)


def read_steps(path: Path) -> Steps:
    """Of a ``metrics.jsonl``, which may not be there. Raises ``CheckpointError`` for one that is something else."""
    lines = _count_lines(path)
    steps = Steps(1 if lines <= MOST_PLOTTED else -(-2 * lines // MOST_PLOTTED))
    for step in iterate_metrics(path):
        steps.add(step)
    for plotted in steps.plotted:
        plotted.close()
    return steps


def _count_lines(path: Path) -> int:
    try:
        with open_regular(path) as file:
            return sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return 0  # the reader tells of it
