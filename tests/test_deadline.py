"""Deadlines that are derived from what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlora.protocol.deadline import REMEMBERED_WAITS, Deadline

seconds = st.floats(min_value=0, max_value=1e5)


def test_deadline_without_measurements_is_the_floor() -> None:
    assert Deadline(30).seconds == 30


def test_deadline_is_at_most_ten_times_the_floor() -> None:
    deadline = Deadline(7200)
    deadline.observe(7200)
    assert deadline.seconds == 72_000
    for _ in range(9):
        deadline.missed()
        deadline.observe(1e9)
    assert deadline.seconds == 72_000


def test_deadline_is_ten_times_the_longest_wait() -> None:
    deadline = Deadline(5)
    for waited in (0.1, 2.0, 0.1):
        deadline.observe(waited)
    assert deadline.seconds == 20


def test_old_waits_are_forgotten() -> None:
    deadline = Deadline(1)
    deadline.observe(0.9)
    for _ in range(REMEMBERED_WAITS - 1):
        deadline.observe(0.2)
    assert deadline.seconds == 9
    deadline.observe(0.2)
    assert deadline.seconds == 2


def test_missed_deadline_doubles_until_one_is_met() -> None:
    deadline = Deadline(4)
    lengths = []
    for _ in range(6):
        lengths.append(deadline.seconds)
        deadline.missed()
    assert lengths == [4, 8, 16, 32, 40, 40]
    deadline.observe(0.1)
    assert deadline.seconds == 4


def test_deadline_adapts_to_a_slower_peer_by_misses() -> None:
    deadline = Deadline(30)
    while deadline.seconds < 100:
        deadline.missed()
    deadline.observe(20)
    assert deadline.seconds == 200


@pytest.mark.parametrize("jump_s", [86_400.0, -86_400.0])
def test_clock_jump_does_not_make_the_deadline_a_day(jump_s: float) -> None:
    deadline = Deadline(10)
    deadline.observe(0.5)
    deadline.observe(jump_s)
    assert deadline.seconds == (100 if jump_s > 0 else 10)


def test_many_misses_do_not_overflow() -> None:
    deadline = Deadline(1e-3)
    for _ in range(10_000):
        deadline.missed()
    assert deadline.seconds == 1e-2


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


@pytest.mark.parametrize("wrong", [{"floor_s": 0}, {"floor_s": 1, "factor": 0.5}])
def test_invalid_bounds_are_an_assertion(wrong: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        Deadline(**wrong)
