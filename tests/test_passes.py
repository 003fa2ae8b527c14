"""How often a rate is halved for passes: what of the training data that depends on."""

from __future__ import annotations

import pytest

from dlora.edge.data.examples import Dataset
from dlora.edge.training.first_rate import different_examples, halvings


def examples(count: int, answers: int, copies: int = 1) -> Dataset:
    """``count`` prompts, the same ones ``copies`` times, whose answers are of ``answers`` kinds."""
    return Dataset.of([([1, 100 + n, 2, 3, n % answers], [3]) for n in range(count)] * copies)


@pytest.mark.parametrize(
    ("steps", "wanted"), [(6, 0), (60, 0), (120, 0), (168, 0), (180, 1), (300, 1), (480, 2), (9999, 2)]
)
def test_half_of_it_for_each_doubling_of_passes_beyond_two(steps: int, wanted: int) -> None:
    assert halvings(examples(60, 60), steps=steps, examples_a_step=1) == wanted


@pytest.mark.parametrize(("steps", "wanted"), [(5, 0), (31, 0), (32, 1), (63, 1), (64, 2)])
def test_a_run_of_few_steps_keeps_more_of_it(steps: int, wanted: int) -> None:
    assert halvings(examples(8, 8), steps=steps, examples_a_step=8) == wanted


@pytest.mark.parametrize("steps", [60, 300, 9999])
@pytest.mark.parametrize("answers", [10, 15])
def test_all_of_it_where_examples_share_their_answers(steps: int, answers: int) -> None:
    assert halvings(examples(60, answers), steps=steps, examples_a_step=1) == 0


def test_an_answer_that_few_examples_share_is_learnt_by_heart_as_well() -> None:
    """As where each example stands there twice, with another system prompt."""
    assert halvings(examples(60, 30), steps=300, examples_a_step=1) == 1


def test_copies_of_an_example_are_passes() -> None:
    dataset = examples(60, 60, copies=5)
    assert halvings(dataset, steps=300, examples_a_step=1) == 1
    assert halvings(dataset, steps=38, examples_a_step=8) == 1


def test_an_example_is_counted_once_and_an_answer_where_it_is() -> None:
    assert different_examples(examples(6, 6)) == (6, 6)
    assert different_examples(examples(6, 6, copies=9)) == (6, 6)
    assert different_examples(examples(9, 2)) == (9, 0)
    assert different_examples(examples(9, 4)) == (9, 9)
    assert different_examples(Dataset.of([([1, 2, 3], [0]), ([1, 2, 3], [1])])) == (1, 1)
