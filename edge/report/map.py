"""The Kill-and-Revive map as a picture, and as a table of how long each unit did what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dlora.edge.run.kr_map import STATE_ORDER, states_by_column
from dlora.protocol.kill_revive import UnitState
from dlora.protocol.tensors import ByteArray

from .numbers import count, share
from .steps import Steps
from .tables import Table

MOST_COLUMNS: Final = 400
_MOST_LABELS: Final = 16
_TALLEST_PX: Final = 420
_ROW_PX: Final = 15


@dataclass(frozen=True)
class KrMap:
    """Units (rows, the deepest on top) over steps (columns).

    Attributes:
        unit: what a unit is.
        columns: of the picture; units: its rows; first, last: steps of its first and last column.
        steps_a_column: a mean; the commonest state of them is shown.
        labels: how far below the top the number of a unit stands, in pixels, and that number.
        outlines: by a state's name, the path around all cells that are in it.
        table: how many steps each unit was in each state.
    """

    unit: str
    columns: int
    units: int
    first: int
    last: int
    steps_a_column: float
    labels: Sequence[tuple[float, int]]
    outlines: Mapping[str, str]
    table: Table
    height_px: int
    label_px: int = 36


def kr_map(steps: Steps, unit: str, names: Sequence[int]) -> KrMap:
    """The map of a run.

    Args:
        unit: what a unit is; names: what each is called.
    """
    at = np.array([step for step, _ in steps.states])
    states = np.stack([entry for _, entry in steps.states])
    first, end = int(at[0]), int(at[0]) + steps.count
    columns = min(steps.count, MOST_COLUMNS)
    cells = states_by_column(at, states, first, end, columns)  # (columns, units)
    seen = [state for state in STATE_ORDER if (states == state).any()]
    lasts = np.diff(np.append(at, end))  # steps of each entry
    in_state = [lasts @ (states == state) for state in seen]  # steps of each unit
    rows = [
        (f"{unit} {name}", *(f"{count(of[row])} ({share(int(of[row]), steps.count)})" for of in in_state))
        for row, name in enumerate(names)
    ]
    units = len(names)
    row_px = min(_ROW_PX, _TALLEST_PX / units)
    labelled = range(0, units, -(-units // _MOST_LABELS))
    return KrMap(
        unit=unit,
        columns=columns,
        units=units,
        first=first,
        last=end - 1,
        steps_a_column=steps.count / columns,
        labels=[(round((units - row - 0.5) * row_px, 1), names[row]) for row in labelled],
        outlines={state.name.lower(): _outline(cells, state) for state in seen},
        table=Table("Steps that each unit was in a state", (unit, *(state.name.lower() for state in seen)), rows),
        height_px=round(row_px * units),
    )


def has_changed(steps: Steps) -> bool:
    """Whether a unit's state ever changed, or is another's than its neighbour's."""
    return len(steps.states) > 1 or any((states != states[0]).any() for _, states in steps.states)


def _outline(cells: ByteArray, state: UnitState) -> str:
    """One path around all cells of a state: a rectangle for each run of them in a row."""
    columns, units = cells.shape
    parts = []
    for unit in range(units):
        inside = np.zeros(columns + 2, bool)
        inside[1:-1] = cells[:, unit] == state
        edges = np.flatnonzero(inside[1:] != inside[:-1]).tolist()
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            parts.append(f"M{start} {units - 1 - unit}h{end - start}v1h{start - end}z")
    return "".join(parts)
