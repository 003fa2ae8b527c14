"""Which rows are held out: always the same, all that say the same or none, as many as asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlora.edge.data.split import FEWEST_AUTO, MOST_AUTO, held_out_rows, parse_split
from dlora.protocol.errors import DataError, UsageError


def digests(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=80), st.floats(0.01, 0.99))
def test_rows_that_say_the_same_stay_together(numbers: list[int], share: float) -> None:
    found = digests(*numbers)
    if len(set(numbers)) < 2:
        with pytest.raises(DataError, match="two different rows"):
            held_out_rows(found, share)
        return
    is_held = held_out_rows(found, share)
    assert set(found[is_held]).isdisjoint(found[~is_held])
    assert is_held.any()
    assert not is_held.all()
    largest = max(numbers.count(number) for number in numbers)
    wanted = min(len(numbers) - 1, max(1, round(share * len(numbers))))
    assert is_held.sum() <= max(wanted, largest)
    order = np.random.default_rng(0).permutation(len(numbers))
    assert (held_out_rows(found[order], share) == is_held[order]).all()  # whatever the order


def test_auto_holds_a_tenth_out_but_not_too_few_or_many() -> None:
    drawn = np.random.default_rng(0).integers(0, 2**63, 5000).astype(np.uint64)
    rows = (FEWEST_AUTO - 1, FEWEST_AUTO, 300, 5000)
    counts = {count: int(held_out_rows(drawn[:count], "auto").sum()) for count in rows}
    assert counts == {FEWEST_AUTO - 1: 0, FEWEST_AUTO: 2, 300: 30, 5000: MOST_AUTO}
    assert not held_out_rows(digests(*[7] * 50), "auto").any()
    assert not held_out_rows(drawn, 0.0).any()


def test_a_row_that_is_added_moves_few_others() -> None:
    drawn = np.random.default_rng(0).integers(0, 2**63, 1010).astype(np.uint64)
    before, after = held_out_rows(drawn[:1000], 0.1), held_out_rows(drawn, 0.1)[:1000]
    assert (before != after).sum() <= 10


@pytest.mark.parametrize("text", ["", "1", "1.5", "-0.1", "nan", "inf", "much"])
def test_a_share_that_cannot_be_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--hold-out"):
        parse_split(text)


def test_shares_are_read() -> None:
    assert [parse_split(text) for text in ("auto", "0", "0.1", "1e-3")] == ["auto", 0.0, 0.1, 0.001]
