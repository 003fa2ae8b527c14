"""The learning rate of a run that names none: what of its training data it depends on."""

from __future__ import annotations

import pytest

from dlora.edge.data.examples import Dataset
from dlora.edge.training.defaults import DEFAULTS, default_lr
from dlora.edge.training.learning_rate import choose_learning_rate, different_examples
from dlora.protocol.choices import KindChoice

USUAL = DEFAULTS["bottleneck"].lr


def examples(count: int, answers: int, copies: int = 1) -> Dataset:
    """``count`` prompts, the same ones ``copies`` times, whose answers are of ``answers`` kinds."""
    return Dataset.of([([1, 100 + n, 2, 3, n % answers], [3]) for n in range(count)] * copies)


@pytest.mark.parametrize(
    ("steps", "halvings"), [(6, 0), (60, 0), (84, 0), (105, 1), (168, 1), (300, 2), (480, 3), (9999, 3)]
)
def test_half_of_it_for_each_doubling_of_passes_over_answers_of_their_own(steps: int, halvings: int) -> None:
    chosen = choose_learning_rate("bottleneck", examples(60, 60), steps=steps, examples_a_step=1)
    assert chosen.lr == USUAL / 2**halvings
    reason = f"{steps / 60:.1f} passes over 60 different examples, 60 with answers of their own"
    assert chosen.reason == (reason if halvings else "")


@pytest.mark.parametrize(("steps", "halvings"), [(5, 0), (15, 0), (16, 1), (31, 1), (32, 2), (64, 3)])
def test_a_run_of_few_steps_keeps_more_of_it(steps: int, halvings: int) -> None:
    assert choose_learning_rate("bottleneck", examples(8, 8), steps=steps, examples_a_step=8).lr == USUAL / 2**halvings


@pytest.mark.parametrize("steps", [60, 300, 9999])
def test_all_of_it_where_examples_share_their_answers(steps: int) -> None:
    for answers in (10, 15):
        chosen = choose_learning_rate("bottleneck", examples(60, answers), steps=steps, examples_a_step=1)
        assert chosen.lr == USUAL


def test_an_answer_that_few_examples_share_is_learnt_by_heart_as_well() -> None:
    """As where each example stands there twice, with another system prompt."""
    assert choose_learning_rate("bottleneck", examples(60, 30), steps=300, examples_a_step=1).lr == USUAL / 4


@pytest.mark.parametrize(("steps", "share"), [(60, 1), (300, 4)])
@pytest.mark.parametrize("kind", DEFAULTS)
def test_the_rate_of_every_kind_falls(kind: KindChoice, steps: int, share: int) -> None:
    chosen = choose_learning_rate(kind, examples(60, 60), steps=steps, examples_a_step=1)
    assert chosen.lr == DEFAULTS[kind].lr / share
    on_device = choose_learning_rate(kind, examples(60, 60), steps=steps, examples_a_step=1, on_device=True)
    assert on_device.lr == default_lr(kind, on_device=True) / share < chosen.lr


def test_copies_of_an_example_are_passes() -> None:
    dataset = examples(60, 60, copies=5)
    assert choose_learning_rate("bottleneck", dataset, steps=300, examples_a_step=1).lr == USUAL / 4
    assert choose_learning_rate("bottleneck", dataset, steps=38, examples_a_step=8).lr == USUAL / 4


def test_an_example_is_counted_once_and_an_answer_where_it_is() -> None:
    assert different_examples(examples(6, 6)) == (6, 6)
    assert different_examples(examples(6, 6, copies=9)) == (6, 6)
    assert different_examples(examples(9, 2)) == (9, 0)
    assert different_examples(examples(9, 4)) == (9, 9)
    assert different_examples(Dataset.of([([1, 2, 3], [0]), ([1, 2, 3], [1])])) == (1, 1)
