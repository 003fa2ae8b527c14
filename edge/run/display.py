"""What the user sees: progress and warnings on stderr, the result on stdout."""

from __future__ import annotations

import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, TextIO

from dlora.edge.training.metrics import StepMetrics
from dlora.protocol.tensors import ByteArray
from dlora.protocol.text import one_line, visible_json

from .kr_map import render_map
from .live_view import LiveView
from .reading_progress import ReadingProgress

if TYPE_CHECKING:  # rich takes a tenth of a second to import, which plain output need not pay
    from rich.status import Status

    from .live_progress import LiveLine

_SMOOTHING = 0.9
_STEPS_FOR_AN_ESTIMATE = 3
_SAY_EVERY_S = 5.0  # at most, where lines are printed and there may be many
_SET_UP: Final = {
    "data": "making A and B: steps' data seen",
    "groups": "making A and B: groups",
    "rate": "finding a learning rate: tries",
}


class Display:
    """Progress, notes and results of a command.

    In a terminal there is a live line, and above it a view of the run where there is room for it; anywhere else, in a
    terminal that cannot move its cursor, and where ``CI`` is set, a plain line for each twentieth of the run.

    Args:
        json_output: whether ``finish`` prints one JSON object instead of a table.
        stream: where progress goes, stderr by default.
    """

    def __init__(self, *, json_output: bool = False, stream: TextIO | None = None) -> None:
        self._json = json_output
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
        self._view: LiveView | None = None
        self._line: LiveLine | None = None
        self._speed, self._steps = _Speed(), 0
        self._evaluation_s = 0.0
        self._evaluations_left: Callable[[int], int] = lambda _: 0
        self._history: list[tuple[int, ByteArray]] = []
        self._blocks: Sequence[int] | None = None

    def say(self, text: str) -> None:
        """One line for the user."""
        self._show(one_line(text))

    def _show(self, text: str) -> None:
        if self._line is not None:
            self._line.console.print(text, markup=False, highlight=False)
        else:
            print(self._wrapped(text), file=self._stream, flush=True)

    def _wrapped(self, text: str) -> str:
        """In lines of the terminal's width that end between words, as rich writes them beside a live line."""
        if not self._terminal or not self._stream.isatty():  # closed since: what is said goes nowhere then
            return text
        width = shutil.get_terminal_size(os.get_terminal_size(self._stream.fileno())).columns
        return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False) if width else text

    def warn(self, text: str) -> None:
        """One line about something that went wrong and was dealt with."""
        self.say(f"warning: {text}")

    @contextmanager
    def reading(self) -> Iterator[Callable[[str], None]]:
        """Show inside what is read, in a terminal; what it yields is called with the place."""
        if not self._terminal:
            yield lambda _: None
            return
        with ExitStack() as shown:
            status: Status | None = None
            progress = ReadingProgress()

            def on_tick(place: str) -> None:
                nonlocal status
                from rich.console import Console
                from rich.markup import escape

                text = f"reading {escape(one_line(progress.words(place)))}"
                if status is None:  # not before the first: it is a thread, and the child that reads is forked without
                    status = shown.enter_context(Console(file=self._stream).status(text))
                status.update(text)

            yield on_tick

    @contextmanager
    def setting_up(self) -> Iterator[Callable[[str, int, int], None]]:
        """Show inside what comes before the first step; what it yields is called with a piece of it, as ``_SET_UP`` has
        them, how many of these are done and how many there are at the most."""
        with ExitStack() as shown:
            said_at = -math.inf

            def show(piece: str, done: int, total: int) -> None:
                nonlocal said_at
                text = _SET_UP[piece]
                if self._terminal and self._line is None:  # only a run that has something to set up calls this
                    shown.enter_context(self._live(text, total, done))
                if self._line is not None:
                    self._line.show(completed=done, total=total, status=text)
                elif piece == "data" or time.monotonic() - said_at >= _SAY_EVERY_S:
                    said_at = time.monotonic()
                    self._show(f"{text} {done}/{total}")

            yield show
            if self._line is not None:
                self._line.show(completed=self._line.tasks[0].total)

    @contextmanager
    def asking_server(self, texts: int) -> Iterator[Callable[[int], None]]:
        """Show progress inside, in a terminal; what it yields is called with how many more texts are there."""
        with self._live("texts from the server", texts, 0):

            def go_on(count: int) -> None:
                if self._line is not None:
                    self._line.go_on(count)

            yield go_on

    @contextmanager
    def training(
        self,
        total_steps: int,
        first_step: int = 0,
        evaluations_left: Callable[[int], int] = lambda _: 0,
        blocks: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Show progress inside; ``step`` moves it.

        Args:
            evaluations_left: knows how many are to come at a step.
            blocks: the number of each unit in the base model, where units are blocks.
        """
        self._blocks = blocks
        self._view = LiveView(total_steps, "group" if blocks is None else "block", blocks)
        self._speed, self._steps = _Speed(), 0
        self._evaluations_left = evaluations_left
        with self._live("train", total_steps, first_step, self._view):
            yield
        self._view = None

    def add_to_map(self, metrics: StepMetrics) -> None:
        """Take a step of before a resumption into the map, and within ``training`` into the view."""
        if metrics.units:
            self._history.append((metrics.step, metrics.states))
        if self._view is not None:
            self._view.add(metrics)

    def step(self, metrics: StepMetrics) -> None:
        """Show a step."""
        self._speed.add(metrics)
        self.add_to_map(metrics)
        self._steps += 1
        left = metrics.total_steps - metrics.step - 1
        if self._steps == _STEPS_FOR_AN_ESTIMATE and left:
            evaluations = self._evaluations_left(metrics.step + 1)
            what = f"{left:,} step{'s' * (left > 1)}"
            if evaluations:
                what += f" and {evaluations:,} evaluation{'s' * (evaluations > 1)}"
            self.say(f"expected time: {_duration(self._seconds_left(metrics))} for {what}")
        done = metrics.step + 1
        if self._line is not None:
            self._line.show(completed=done, status=self._status(metrics))
        elif done == 1 or done == metrics.total_steps or done % max(1, metrics.total_steps // 20) == 0:
            self._show(f"step {done}/{metrics.total_steps}  {self._status(metrics)}")

    @contextmanager
    def evaluating(self, when: str, examples: int) -> Iterator[Callable[[int], None]]:
        """Show progress of an evaluation; what it yields is called with how many more examples are done."""
        started, said_at, seen = time.perf_counter(), time.monotonic(), 0
        training = self._line  # in the midst of it: the same line, not a second live display
        with self._live(f"evaluate {when}".strip(), examples, 0) if training is None else nullcontext():

            def advance(count: int) -> None:
                nonlocal seen, said_at
                seen += count
                if training is not None:
                    training.show(status=f"evaluating {seen}/{examples}")
                elif self._line is not None:
                    self._line.go_on(count)
                elif time.monotonic() - said_at >= _SAY_EVERY_S and seen < examples:
                    said_at = time.monotonic()
                    self._show(f"evaluating {seen}/{examples}")

            yield advance
        self._evaluation_s = time.perf_counter() - started

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Print the result on stdout: one JSON object, or a table, after the map if kill-and-revive did anything."""
        if self._json:
            print(visible_json(summary))
            return
        if any((states != self._history[0][1]).any() for _, states in self._history):
            colour = self._terminal and not os.environ.get("NO_COLOR")
            name = "group" if self._blocks is None else "block"
            self._show(render_map(self._history, height=40, colour=colour, name=name, numbers=self._blocks))
        print(summary_table(summary))

    @contextmanager
    def _live(self, name: str, total: int, done: int, view: LiveView | None = None) -> Iterator[None]:
        if not self._terminal:
            yield
            return
        from .live_progress import LiveLine

        with LiveLine(name, total, done, self._stream, view) as self._line:
            try:
                yield
            finally:
                self._line = None

    def _status(self, metrics: StepMetrics) -> str:
        speed = self._speed
        return (
            f"loss {metrics.loss:.3f}  {speed.tokens_per_s:.0f} tok/s  "
            f"{_mb(metrics.bytes_up)}↑ {_mb(metrics.bytes_down)}↓ MB/step  "
            f"active {metrics.active_units}/{len(metrics.units) or metrics.live_units}  "
            f"eta {_duration(self._seconds_left(metrics))}"
        )

    def _seconds_left(self, metrics: StepMetrics) -> float:
        """Steps as fast as of late, and evaluations as long as the last one."""
        done = metrics.step + 1
        evaluations = self._evaluations_left(done) * self._evaluation_s
        return self._speed.step_s * (metrics.total_steps - done) + evaluations


class _Speed:
    """Moving averages of speed: kill-and-revive makes steps cheaper as a run goes on."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self._tokens = 0.0
        self._weight = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self.step_s if self.step_s else 0.0

    def add(self, metrics: StepMetrics) -> None:
        # Weights that sum to one from the first step on, as in Adam's bias correction.
        self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
        share = (1 - _SMOOTHING) / self._weight
        self.step_s += share * (metrics.step_s - self.step_s)
        self._tokens += share * (metrics.tokens - self._tokens)


def summary_table(summary: Mapping[str, Any]) -> str:
    """A result as aligned lines; bytes and seconds get readable units, lists and what is None are left out."""
    rows = [(_title(key), _value(key, value)) for key, value in _flat(summary)]
    width = max((len(title) for title, _ in rows), default=0)
    return "\n".join(f"{title:<{width}}  {value}" for title, value in rows)


def _flat(summary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in summary.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key} ")
        elif value is not None and not isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", value


def _title(key: str) -> str:
    for unit in ("_s", "_mb"):
        key = key.removesuffix(unit)
    return key.replace("_", " ")


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return one_line(str(value))
    if "bytes" in key and value >= 1e5:
        return f"{value / 1e6:,.2f} MB"
    if key.endswith("_mb"):
        return f"{value:,.1f} MB"
    if key.endswith("_s"):
        return f"{value:,.2f} s" if value < 120 else _duration(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _mb(size: int) -> str:
    """Four characters of MB: the line must fit in 80 columns."""
    return f"{size / 1e6:.2f}" if size < 9.995e6 else f"{size / 1e6:.1f}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
