"""The kill-and-revive map: which unit did what when, in characters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Final

import numpy as np

from dlora.protocol.kill_revive import UnitState
from dlora.protocol.tensors import ByteArray

History = Sequence[tuple[int, ByteArray]]
"""(step, states uint8 (units,)), steps ascending. States last until the next entry."""

# A character and its colour. Where several units or steps share a character, the state that comes first wins a tie.
_LOOKS: Final = {
    UnitState.ACTIVE: ("█", "\x1b[32m"),
    UnitState.FADING: ("▒", "\x1b[33m"),
    UnitState.HELD: ("─", "\x1b[36m"),
    UnitState.GIVEN: ("∘", "\x1b[2;36m"),
    UnitState.KILLED: ("·", "\x1b[2m"),
}
STATE_ORDER: Final = tuple(_LOOKS)
_RESET: Final = "\x1b[0m"


def render_map(
    history: History,
    *,
    width: int = 80,
    height: int | None = None,
    colour: bool = False,
    name: str = "block",
    numbers: Sequence[int] | None = None,
) -> str:
    """A map of units (rows, the deepest on top) over steps (columns), with an axis and a legend.

    Args:
        history: at least one entry.
        width, height: most characters and most lines of the map's body; steps and units share characters to fit.
        colour: whether to colour the characters (ANSI); they differ without colour as well.
        name: what a unit is; numbers: what each is called, ascending; by default from 0.
    """
    steps = np.array([step for step, _ in history])
    states = np.stack([entry for _, entry in history])  # (entries, units)
    first, end = int(steps[0]), int(steps[-1]) + 1
    numbers = range(states.shape[1]) if numbers is None else numbers
    label = max(len(name) + 1 + len(str(numbers[-1])), 8)
    columns = max(1, min(end - first, width - label - 1))
    cells = states_by_column(steps, states, first, end, columns)  # (columns, units)
    rows = states_by_row(cells, height)
    lines = []
    for (begin, stop), row in reversed(list(zip(_unit_ranges(cells.shape[1], len(rows)), rows, strict=True))):
        last = numbers[stop - 1]
        said = f"{name} {last}" if stop - begin == 1 else f"{numbers[begin]}–{last}"
        lines.append(f"{said:>{label}} {paint(row, colour)}")
    left, right = str(first), str(end - 1)
    axis = left + right.rjust(columns - len(left)) if columns > len(left) + len(right) else f"{left}–{right}"
    lines.append(f"{'step':>{label}} {axis}")
    seen = [state for state in STATE_ORDER if (states == state).any()]
    legend = "  ".join(f"{paint([state], colour)} {state.name.lower()}" for state in seen)
    return "\n".join([*lines, f"{'':>{label}} {legend}"])


def states_by_column(steps: np.ndarray, states: ByteArray, first: int, end: int, columns: int) -> ByteArray:
    """The commonest state of each unit in each column, uint8 (columns, units).

    Args:
        steps: of the entries, ascending; states: uint8 (entries, units), each lasting until the next entry.
        first, end: steps that the columns share.
    """
    edges = np.linspace(first, end, columns + 1).round().astype(np.int64)
    cells = np.empty((columns, states.shape[1]), np.uint8)
    for column in range(columns):
        inside = np.arange(edges[column], max(edges[column + 1], edges[column] + 1))
        entries = np.searchsorted(steps, inside, side="right") - 1
        counts = np.stack([(states[entries] == state).sum(axis=0) for state in STATE_ORDER])
        cells[column] = np.array(STATE_ORDER, np.uint8)[counts.argmax(axis=0)]
    return cells


def states_by_row(cells: ByteArray, height: int | None) -> list[list[UnitState]]:
    """Rows of states, unit 0 first; where units share a row, the liveliest shows."""
    units = cells.shape[1]
    order = np.zeros(max(UnitState) + 1, np.uint8)
    order[list(STATE_ORDER)] = np.arange(len(STATE_ORDER))
    return [
        [STATE_ORDER[int(best)] for best in order[cells[:, start:stop]].min(axis=1)]
        for start, stop in _unit_ranges(units, min(units, height or units))
    ]


def _unit_ranges(units: int, rows: int) -> list[tuple[int, int]]:
    return list(pairwise(round(row * units / rows) for row in range(rows + 1)))


def paint(row: Sequence[UnitState], colour: bool) -> str:
    """States as characters, with ANSI colours or without."""
    painted = ""
    for state, alike in groupby(row):
        character, painting = _LOOKS[state]
        characters = character * len(list(alike))
        painted += f"{painting}{characters}{_RESET}" if colour else characters
    return painted
