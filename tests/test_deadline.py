"""Deadlines that are derived from what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlora.protocol.deadline import REMEMBERED, Deadline

seconds = st.floats(min_value=0, max_value=1e5)


def test_before_anything_is_measured_it_is_the_floor() -> None:
    assert Deadline(30).seconds == 30


def test_it_grows_to_ten_times_the_floor_and_no_further() -> None:
    deadline = Deadline(7200)
    deadline.observe(7200)
    assert deadline.seconds == 72_000
    for _ in range(9):
        deadline.missed()
        deadline.observe(1e9)
    assert deadline.seconds == 72_000


def test_it_is_ten_times_the_longest_wait() -> None:
    deadline = Deadline(5)
    for waited in (0.1, 2.0, 0.1):
        deadline.observe(waited)
    assert deadline.seconds == 20


def test_what_is_long_ago_is_forgotten() -> None:
    deadline = Deadline(1)
    deadline.observe(0.9)
    for _ in range(REMEMBERED - 1):
        deadline.observe(0.2)
    assert deadline.seconds == 9
    deadline.observe(0.2)
    assert deadline.seconds == 2


def test_a_miss_doubles_it_until_one_is_met() -> None:
    deadline = Deadline(4)
    lengths = []
    for _ in range(6):
        lengths.append(deadline.seconds)
        deadline.missed()
    assert lengths == [4, 8, 16, 32, 40, 40]
    deadline.observe(0.1)
    assert deadline.seconds == 4


def test_a_peer_that_has_become_slow_is_found_out_by_misses() -> None:
    deadline = Deadline(30)
    while deadline.seconds < 100:
        deadline.missed()
    deadline.observe(20)
    assert deadline.seconds == 200


@pytest.mark.parametrize("jump_s", [86_400.0, -86_400.0])
def test_a_clock_that_jumps_a_day_does_not_make_it_wait_a_day(jump_s: float) -> None:
    deadline = Deadline(10)
    deadline.observe(0.5)
    deadline.observe(jump_s)
    assert deadline.seconds == (100 if jump_s > 0 else 10)


def test_years_of_misses_overflow_nothing() -> None:
    deadline = Deadline(1e-3)
    for _ in range(10_000):
        deadline.missed()
    assert deadline.seconds == 1e-2


@given(st.lists(st.one_of(seconds, st.none()), max_size=200), seconds)
def test_whatever_happens_it_stays_in_bounds_and_covers_what_it_met(history: list[float | None], last: float) -> None:
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
def test_bounds_that_cannot_be_meant_are_a_bug(wrong: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        Deadline(**wrong)
