"""The learning rate of a run that names none: what of its training data it depends on."""

from __future__ import annotations

import pytest

from dlora.edge.data.examples import Dataset
from dlora.edge.training.defaults import DEFAULTS
from dlora.edge.training.learning_rate import choose_learning_rate, different_examples

USUAL = DEFAULTS["bottleneck"].lr


def examples(count: int, answers: int, copies: int = 1) -> Dataset:
    """``count`` prompts, the same ones ``copies`` times, whose answers are of ``answers`` kinds."""
    return Dataset.of([([1, 100 + n, 2, 3, n % answers], [3]) for n in range(count)] * copies)


@pytest.mark.parametrize(
    ("epochs", "halvings"), [(0.1, 0), (1, 0), (1.4, 0), (1.74, 1), (2.8, 1), (5, 2), (8, 3), (400, 3)]
)
def test_half_of_it_for_each_doubling_of_passes_over_answers_of_their_own(epochs: float, halvings: int) -> None:
    chosen = choose_learning_rate("bottleneck", examples(60, 60), epochs)
    assert chosen.lr == USUAL / 2**halvings
    reason = f"{epochs:.1f} passes over 60 different examples, 60 with answers of their own"
    assert chosen.reason == (reason if halvings else "")


@pytest.mark.parametrize("epochs", [1, 5, 40])
def test_all_of_it_where_examples_share_their_answers(epochs: float) -> None:
    assert choose_learning_rate("bottleneck", examples(60, 10), epochs).lr == USUAL
    assert choose_learning_rate("bottleneck", examples(60, 15), epochs).lr == USUAL


def test_an_answer_that_few_examples_share_is_learnt_by_heart_as_well() -> None:
    """As where each example stands there twice, with another system prompt."""
    assert choose_learning_rate("bottleneck", examples(60, 30), 5).lr == USUAL / 4


@pytest.mark.parametrize("epochs", [1, 5, 40])
def test_lora_has_one_rate(epochs: float) -> None:
    assert choose_learning_rate("lora", examples(60, 60), epochs).lr == DEFAULTS["lora"].lr


def test_copies_of_an_example_are_passes() -> None:
    assert choose_learning_rate("bottleneck", examples(60, 60, copies=5), 1.0).lr == USUAL / 4


def test_an_example_is_counted_once_and_an_answer_where_it_is() -> None:
    assert different_examples(examples(6, 6)) == (6, 6)
    assert different_examples(examples(6, 6, copies=9)) == (6, 6)
    assert different_examples(examples(9, 2)) == (9, 0)
    assert different_examples(examples(9, 4)) == (9, 9)
    assert different_examples(Dataset.of([([1, 2, 3], [0]), ([1, 2, 3], [1])])) == (1, 1)
