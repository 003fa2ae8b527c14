"""How good answers are: what counts as right, and intervals that hold what they should."""

from __future__ import annotations

import numpy as np
import pytest

from dlora.edge.choices import AnswerScore
from dlora.edge.data.question import Question
from dlora.edge.scoring.answers import compile_pattern, is_right
from dlora.edge.scoring.intervals import difference, interval
from dlora.protocol.errors import UsageError


def question(reference: str, key: str = "", choices: tuple[str, ...] = ()) -> Question:
    return Question("d:1", "?", b"", reference, key or reference.strip(), [*choices], [])


@pytest.mark.parametrize(
    ("how", "answer", "asked", "pattern", "right"),
    [
        ("exact", " a  b\n", question("a b"), None, True),
        ("exact", "A b", question("a b"), None, False),
        ("contains", "I say: It IS  Rye, clearly", question("it is rye"), None, True),
        ("contains", "rye", question("the answer is rye", "rye"), None, True),
        ("contains", "", question("rye"), None, False),
        ("regex", "the correct answer is a2, not a1", question("x", "a2", ("a1", "a2")), None, True),
        ("regex", "a1 or a2", question("x", "a2", ("a1", "a2")), None, False),
        ("regex", "True", question("x", "true", ("true", "false")), None, False),  # as LLM-Adapters has it
        ("regex", "True", question("x", "true"), "(?i)true|false", True),
        ("regex", "so 41 + 1 = 42.", question("= 42"), r"= (\d+)", True),
        ("regex", "so 41", question("= 42"), r"= (\d+)", False),
        ("regex", "a.b", question("x", "a.b", ("a.b", "aXb")), None, True),
    ],
)
def test_answers_that_count(how: AnswerScore, answer: str, asked: Question, pattern: str | None, right: bool) -> None:
    assert is_right(how, answer, asked, None if pattern is None else compile_pattern(pattern)) == right


def test_a_pattern_that_is_none_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no regular expression"):
        compile_pattern("(")


@pytest.mark.parametrize(("truth", "examples"), [(0.5, 60), (0.8, 100), (0.3, 400)])
def test_intervals_hold_a_planted_share(truth: float, examples: int) -> None:
    """In 95 of 100 repetitions, about."""
    drawn = np.random.default_rng(1).random((200, examples)) < truth
    holds = [found.low <= truth <= found.high for found in map(interval, drawn)]
    assert 0.88 <= np.mean(holds) <= 1


def test_intervals_hold_a_planted_mean_loss_of_examples_of_other_lengths() -> None:
    generator, holds = np.random.default_rng(2), []
    for _ in range(150):
        counts = generator.integers(1, 30, 80)
        losses = generator.gamma(2.0, 1.0, 80) * counts  # a mean of 2 a label, whatever the length
        found = interval(losses, counts)
        holds.append(found.low <= 2 <= found.high)
        assert found.low < found.mean < found.high
    assert 0.87 <= np.mean(holds) <= 1


def test_differences_are_of_pairs() -> None:
    """What both have in common does not make a difference less sure."""
    generator = np.random.default_rng(3)
    common = generator.normal(0, 10, 200)
    first, second = common + 0.3 + generator.normal(0, 0.1, 200), common
    found = difference(first, second)
    assert 0.25 < found.low < 0.3 < found.high < 0.35
    nothing = difference(first, first)
    assert (nothing.mean, nothing.low, nothing.high) == (0, 0, 0)


@pytest.mark.parametrize(("value", "low", "high"), [(1.0, 0.85, 1.0), (0.0, 0.0, 0.15)])
def test_all_right_or_wrong_is_not_certain(value: float, low: float, high: float) -> None:
    found = interval(np.full(20, value))
    assert (found.mean, found.low, found.high) == pytest.approx((value, low, high))
