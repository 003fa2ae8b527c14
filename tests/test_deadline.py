"""Deadlines that are derived from what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlora.protocol.deadline import REMEMBERED_WAITS, Deadline

seconds = st.floats(min_value=0, max_value=1e5)
MISSED = None


@pytest.mark.parametrize(
    ("floor_s", "history", "wanted"),
    [
        (30, [], 30),  # nothing was measured
        (5, [0.1, 2.0, 0.1], 20),  # ten times the longest wait
        (7200, [7200], 72_000),  # at most ten times the floor
        (7200, [7200, *([MISSED, 1e9] * 9)], 72_000),
        (1, [0.9, *([0.2] * (REMEMBERED_WAITS - 1))], 9),
        (1, [0.9, *([0.2] * REMEMBERED_WAITS)], 2),  # old waits are forgotten
        *((4, [MISSED] * missed, wanted) for missed, wanted in enumerate((4, 8, 16, 32, 40, 40))),
        (4, [*([MISSED] * 5), 0.1], 4),  # met again
        (30, [MISSED, MISSED, 20], 200),  # a slower peer
        (10, [0.5, 86_400.0], 100),  # a clock that jumped
        (10, [0.5, -86_400.0], 10),
        (1e-3, [MISSED] * 10_000, 1e-2),
    ],
)
def test_deadline_after_what_was_measured(floor_s: float, history: list[float | None], wanted: float) -> None:
    deadline = Deadline(floor_s)
    for waited in history:
        if waited is MISSED:
            deadline.missed()
        else:
            deadline.observe(waited)
    assert deadline.seconds == wanted


@given(st.lists(st.one_of(seconds, st.none()), max_size=200), seconds)
def test_deadline_stays_in_bounds_and_above_observed_waits(history: list[float | None], last: float) -> None:
    deadline = Deadline(50, factor=3)
    for waited in history:
        before = deadline.seconds
        if waited is None:
            deadline.missed()
            assert deadline.seconds == min(500, 2 * before)
        else:
            deadline.observe(waited)
        assert 50 <= deadline.seconds <= 500
    met = min(last, deadline.seconds)
    deadline.observe(last)
    assert deadline.seconds >= min(500, 3 * met)
