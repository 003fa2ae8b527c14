"""What a terminal shows of a run as it goes: the loss as a curve, what each unit does, what has crossed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from dlora.edge.training.metrics import StepMetrics
from dlora.protocol.kill_revive import UnitState
from dlora.protocol.tensors import ByteArray

from .kr_map import paint, states_by_row

LEAST_COLUMNS: Final = 60
LEAST_LINES: Final = 16
_CURVE_LINES: Final = 5
_MOST_COLUMNS: Final = 100
_BUCKETS: Final = 4 * _MOST_COLUMNS
_LABEL: Final = 7
# Of a character's two columns of four dots, from the top.
_DOTS: Final = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK: Final = 0x2800


class LossCurve:
    """Mean losses of equal parts of a run, in memory that does not grow with it."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._sums = np.zeros(min(_BUCKETS, total_steps))
        self._counts = np.zeros(len(self._sums), np.int64)

    def add(self, step: int, loss: float) -> None:
        """The loss of a step; one that is no number is left out."""
        if math.isfinite(loss) and 0 <= step < self._total:
            bucket = step * len(self._sums) // self._total
            self._sums[bucket] += loss
            self._counts[bucket] += 1

    def lines(self, columns: int) -> list[str]:
        """The curve in braille, with its highest and lowest mean; nothing before the first loss."""
        width = min(columns, _MOST_COLUMNS) - _LABEL - 1
        means = self._means(2 * width)
        known = means[np.isfinite(means)]
        if not known.size:
            return []
        lowest, highest = float(known.min()), float(known.max())
        room = (highest - lowest) or 1.0
        at = np.flatnonzero(np.isfinite(means))
        drawn = np.interp(np.arange(len(means)), at, known, left=np.nan, right=np.nan)
        heights = np.rint((highest - drawn) / room * (4 * _CURVE_LINES - 1))  # from the top
        grid = np.zeros((_CURVE_LINES, width), np.int64)
        before: int | None = None
        for column, height in enumerate(heights):
            if math.isnan(height):
                continue
            here = int(height)
            # A line from the last point on: else steep parts fall into dots.
            start = here if before is None or before == here else before + (1 if here > before else -1)
            for dot in range(min(start, here), max(start, here) + 1):
                grid[dot // 4, column // 2] |= _DOTS[column % 2][dot % 4]
            before = here
        labels = {0: f"{highest:.3g}"} | ({_CURVE_LINES - 1: f"{lowest:.3g}"} if lowest < highest else {})
        return [
            f"{labels.get(index, ''):>{_LABEL}} {''.join(chr(_BLANK + int(cell)) for cell in row)}".rstrip(chr(_BLANK))
            for index, row in enumerate(grid)
        ]

    def _means(self, columns: int) -> np.ndarray:
        """Of each column of dots, NaN where there is none yet."""
        parts = min(columns, len(self._sums))
        edges = np.linspace(0, len(self._sums), parts + 1).astype(np.int64)[:-1]
        sums, counts = np.add.reduceat(self._sums, edges), np.add.reduceat(self._counts, edges)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = np.where(counts > 0, sums / counts, np.nan)
        spread = np.full(columns, np.nan)
        spread[np.linspace(0, columns - 1, parts).round().astype(np.int64)] = found
        return spread


class LiveView:
    """The lines above the one with the numbers.

    Args:
        name: what a unit is; numbers: what each is called; by default from 0.
    """

    def __init__(self, total_steps: int, name: str, numbers: Sequence[int] | None) -> None:
        self._curve = LossCurve(total_steps)
        self._name = name
        self._numbers = numbers
        self._states: ByteArray | None = None
        self._up = self._down = 0

    def add(self, metrics: StepMetrics) -> None:
        """A step, of this start of the run or an earlier one."""
        self._curve.add(metrics.step, metrics.loss)
        self._up += metrics.bytes_up
        self._down += metrics.bytes_down
        if metrics.units:
            self._states = metrics.states

    def lines(self, columns: int, *, colour: bool) -> Iterator[str]:
        """As many as there is something to show, at most ``columns`` wide; with ANSI colours, or without."""
        yield from self._curve.lines(columns)
        if self._states is not None:
            yield self._strip(self._states, columns, colour=colour)
        if self._up or self._down:
            yield f"{'MB':>{_LABEL}} {self._up / 1e6:,.1f}↑ {self._down / 1e6:,.1f}↓ so far"

    def _strip(self, states: ByteArray, columns: int, *, colour: bool) -> str:
        """A character for each unit, the lowest first; some share one where there are too many."""
        numbers = range(len(states)) if self._numbers is None else self._numbers
        first, last = str(numbers[0]), str(numbers[-1])
        room = min(columns, _MOST_COLUMNS) - _LABEL - len(first) - len(last) - 3
        rows = states_by_row(states[None, :], room)
        shown = [UnitState(state) for (state,) in rows]
        return f"{self._name + 's':>{_LABEL}} {first} {paint(shown, colour)} {last}"
