"""How often a rate is halved for passes: what of the training data that depends on."""

from __future__ import annotations

import pytest

from dlora.edge.data.examples import Dataset
from dlora.edge.training.first_rate import different_examples, halvings


def examples(count: int, answers: int, copies: int = 1) -> Dataset:
    """``count`` prompts, the same ones ``copies`` times, whose answers are of ``answers`` kinds."""
    return Dataset.of([([1, 100 + n, 2, 3, n % answers], [3]) for n in range(count)] * copies)


@pytest.mark.parametrize(
    ("dataset", "examples_a_step", "wanted"),
    [
        # Once more for each doubling of passes beyond two.
        ((60, 60), 1, {6: 0, 60: 0, 120: 0, 168: 0, 180: 1, 300: 1, 480: 2, 9999: 2}),
        ((8, 8), 8, {5: 0, 31: 0, 32: 1, 63: 1, 64: 2}),  # a run of few steps keeps more of its rate
        # All of it where examples share their answers; one that few share is learnt by heart as well.
        ((60, 10), 1, {60: 0, 300: 0, 9999: 0}),
        ((60, 15), 1, {60: 0, 300: 0, 9999: 0}),
        ((60, 30), 1, {300: 1}),
        ((60, 60, 5), 1, {300: 1}),  # copies of an example are passes
        ((60, 60, 5), 8, {38: 1}),
    ],
)
def test_how_often_the_rate_is_halved(dataset: tuple[int, ...], examples_a_step: int, wanted: dict[int, int]) -> None:
    """By the number of steps."""
    data = examples(*dataset)
    assert {steps: halvings(data, steps=steps, examples_a_step=examples_a_step) for steps in wanted} == wanted


def test_an_example_is_counted_once_and_an_answer_where_it_is() -> None:
    assert different_examples(examples(6, 6)) == (6, 6)
    assert different_examples(examples(6, 6, copies=9)) == (6, 6)
    assert different_examples(examples(9, 2)) == (9, 0)
    assert different_examples(examples(9, 4)) == (9, 9)
    assert different_examples(Dataset.of([([1, 2, 3], [0]), ([1, 2, 3], [1])])) == (1, 1)
