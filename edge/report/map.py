"""The Kill-and-Revive map as a picture, and as a table of how long each unit did what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from dlora.edge.run.kr_map import STATE_ORDER, states_by_column
from dlora.protocol.kill_revive import UnitState
from dlora.protocol.tensors import ByteArray

from .html import Html, element, folded, join, table
from .numbers import count, share
from .steps import Steps

MOST_COLUMNS: Final = 400
_MOST_LABELS: Final = 16
_TALLEST_PX: Final = 420
_ROW_PX: Final = 15
_LABEL_PX: Final = 36


def kr_map(steps: Steps, name: str, numbers: Sequence[int]) -> Html:
    """Units (rows, the deepest on top) over steps (columns).

    Args:
        name: what a unit is; numbers: what each is called.
    """
    at = np.array([step for step, _ in steps.states])
    states = np.stack([entry for _, entry in steps.states])
    first, end = int(at[0]), int(at[0]) + steps.count
    cells = states_by_column(at, states, first, end, min(steps.count, MOST_COLUMNS))  # (columns, units)
    seen = [state for state in STATE_ORDER if (states == state).any()]
    lengths = _steps_by_state(at, states, end)
    heads = [state.name.lower() for state in seen]
    rows = [
        (f"{name} {number}", *(f"{count(of[state])} ({share(int(of[state]), steps.count)})" for state in seen))
        for number, of in zip(numbers, lengths, strict=True)
    ]
    keys = [element("span", each, class_=f"key {each}") for each in heads]
    return join((
        _picture(cells, seen, name, numbers),
        element("p", element("span", f"step {count(first)}"), element("span", f"step {count(end - 1)}"), class_="ends"),
        element("p", keys, class_="keys"),
        folded("Numbers", table("Steps that each unit was in a state", (name, *heads), rows)),
    ))  # fmt: skip


def has_changed(steps: Steps) -> bool:
    """Whether a unit's state ever changed, or is another's than its neighbour's."""
    return len(steps.states) > 1 or any((states != states[0]).any() for _, states in steps.states)


def _picture(cells: ByteArray, seen: Sequence[UnitState], name: str, numbers: Sequence[int]) -> Html:
    columns, units = cells.shape
    row = min(_ROW_PX, _TALLEST_PX / units)
    height = round(row * units)
    labels = [
        element("text", str(numbers[unit]), x=_LABEL_PX - 8, y=round((units - unit - 0.5) * row, 1))
        for unit in range(0, units, -(-units // _MOST_LABELS))
    ]
    said = f"Map of {units} {name}s over the steps; the table below has its numbers"
    paths = [element("path", d=_outline(cells, state), class_=state.name.lower()) for state in seen]
    box = f"0 0 {columns} {units}"
    return element(
        "div",
        element("svg", labels, width=_LABEL_PX, height=height, aria_hidden="true"),
        element("svg", paths, viewBox=box, preserveAspectRatio="none", height=height, role="img", aria_label=said),
        class_="map",
    )


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


def _steps_by_state(at: npt.NDArray[np.int64], states: ByteArray, end: int) -> npt.NDArray[np.int64]:
    """How many steps each unit was in each state, (units, states)."""
    lasts = np.diff(np.append(at, end))  # (entries,)
    return np.stack([lasts @ (states == state) for state in range(max(UnitState) + 1)], axis=1)
