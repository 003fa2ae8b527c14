"""A learning rate that nobody gave: found before the first step, and nothing but the rate is left of the search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from families import VOCABULARY
from serving import config, random_dataset, serving, training
from tiny import TinyFactory
from trunk_runs import trunk_config, trunk_training

from dlora.edge.run.plan import first_rate_mb
from dlora.edge.training.first_rate import FIRST_SIZE, MOST_TRIES, FoundRate, find_rate, probed_steps, rate_for_size
from dlora.edge.training.trainer import Trainer
from dlora.protocol.choices import KindChoice

OPEN = {"lr": None, "schedule": "linear", "warmup": 0.2}


@dataclass
class Losses:
    """A loss that falls until an update of ``best`` and rises after it, and the sizes that were asked for."""

    best: float
    asked: list[float]

    def __call__(self, size: float) -> float:
        self.asked.append(size)
        return math.log2(size / self.best) ** 2


def found(best: float) -> tuple[FoundRate, list[float]]:
    losses = Losses(best, [])
    return find_rate(losses, _a_fifth, lambda done, most: None), losses.asked


def _a_fifth(size: float) -> float:
    return 0.2 * size


# -- the search ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [0.0003, 0.013, 0.04, 0.05, 0.9])
def test_a_rate_is_a_share_of_the_best_size_wherever_that_is(best: float) -> None:
    rate, asked = found(best)
    assert rate.size == pytest.approx(best)
    assert rate.lr == float(f"{0.2 * best:.2g}")
    assert len(set(asked)) == len(asked) == rate.tries <= MOST_TRIES


def test_a_search_tries_no_size_twice_as_large_as_one_that_does_harm() -> None:
    _, asked = found(FIRST_SIZE)
    assert asked == [2 * FIRST_SIZE, FIRST_SIZE, FIRST_SIZE / 2]


@pytest.mark.parametrize(
    ("loss_after", "size"),
    [
        (lambda size: -size, FIRST_SIZE * 2 ** (MOST_TRIES - 1)),  # it falls for ever
        (lambda size: math.inf if size > 0.03 else 1.0 - size, FIRST_SIZE),
        (lambda size: math.inf if size > 0.003 else 1.0 - size, FIRST_SIZE / 8),
    ],
)
def test_a_search_ends_at_the_largest_size_that_can_be(loss_after: Callable[[float], float], size: float) -> None:
    rate = find_rate(loss_after, _a_fifth, lambda done, most: None)
    assert rate.size == size
    assert rate.tries <= MOST_TRIES


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("lora", [0.0025, 0.005, 0.01, 0.02]),  # A and B are trained: the root of the size
        ("ffa", [0.01, 0.04, 0.16, 1.0]),
        ("bottleneck", [0.005, 0.02, 0.045, 0.045]),
    ],
)
def test_a_kinds_rate_goes_with_the_size_of_the_best_first_update(kind: KindChoice, rates: list[float]) -> None:
    sizes = (0.01, 0.04, 0.16, 1.0)
    assert [rate_for_size(kind, size, halvings=0, on_device=False) for size in sizes] == pytest.approx(rates)


def test_in_passes_a_large_size_counts_by_its_root() -> None:
    """Below .01 it is live's: what passes leave out is too little to matter."""
    sizes = (0.002, 0.01, 0.04, 0.16)
    live, in_passes = (
        [rate_for_size("bottleneck", size, halvings=0, on_device=False, in_passes=asked) for size in sizes]
        for asked in (False, True)
    )
    assert in_passes == pytest.approx([0.001, 0.005, 0.01, 0.02])
    assert live[:2] == pytest.approx(in_passes[:2])


def test_a_rate_falls_with_passes_before_its_upper_end_holds() -> None:
    found = [rate_for_size("lora", size, halvings=1, on_device=True) for size in (0.1, 0.2, 1.0)]
    assert found == pytest.approx([0.0075, 0.015, 0.016])


@pytest.mark.parametrize(
    ("examples", "total", "steps"),
    [(8, 100, [1, 2]), (4, 100, [1, 2, 3, 4]), (32, 100, [1]), (4, 3, [1, 2]), (8, 1, [0])],
)
def test_an_update_is_probed_with_the_examples_of_the_next_steps(examples: int, total: int, steps: list[int]) -> None:
    assert list(probed_steps(examples, total)) == steps


def test_every_try_is_told_before_it_is_made() -> None:
    told: list[tuple[int, int]] = []
    losses = Losses(0.01, [])
    find_rate(losses, _a_fifth, lambda done, most: told.append((done, most)))
    assert told == [(number, MOST_TRIES) for number in range(len(losses.asked))]


# -- in a run ------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "ffa": {"kind": "ffa"},
    "bottleneck": {"kind": "bottleneck", "lora_alpha": 4.0, "basis_steps": 2, "wire_dtype": "int8"},
    "some units": {"kill_revive": {"active_fraction": 0.5, "warmup_steps": 1}},
}


@contextmanager
def trainer_of(tiny: TinyFactory, name: str, folder: Path, **optimizer: Any) -> Iterator[Trainer]:
    made, dataset = tiny(device_blocks=1) if name == "trunk" else tiny(), random_dataset(VOCABULARY)
    with serving(made.base) as server:
        if name == "trunk":
            run = trunk_config((1,), optimizer=optimizer)
            with trunk_training(made.bundle, server.url, run, dataset, folder.with_suffix(".cache")) as trainer:
                yield trainer
        else:
            run = config(optimizer=optimizer, **RUNS[name])
            with training(made.bundle, server.url, run, dataset) as trainer:
                yield trainer


def state_after(trainer: Trainer, steps: int) -> tuple[dict[str, Any], list[float]]:
    rates = [trainer.run_step().learning_rate for _ in range(steps)]
    trainer.wait_for_signal()
    return {name: tensor.copy() for name, tensor in trainer.adapters.state().items()}, rates


@pytest.mark.parametrize("name", [*RUNS, "trunk"])
def test_a_run_that_finds_its_rate_is_the_run_that_is_given_it(tiny: TinyFactory, tmp_path: Path, name: str) -> None:
    with trainer_of(tiny, name, tmp_path / "open", **OPEN) as trainer:
        rate = trainer.find_rate()
        identity = trainer.identity
        state, rates = state_after(trainer, 4)
    kind = msgspec.convert(trainer.config.adapter.kind, KindChoice)
    assert rate.lr == float(f"{rate_for_size(kind, rate.size, halvings=0, on_device=name == 'trunk'):.2g}")
    assert max(rates) == trainer.peak_rate == rate.lr
    with trainer_of(tiny, name, tmp_path / "given", **{**OPEN, "lr": rate.lr}) as given:
        assert given.identity == identity
        wanted, _ = state_after(given, 4)
    assert state.keys() == wanted.keys()
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(state[key], tensor, err_msg=key)


def test_a_run_of_many_passes_finds_half_the_rate(tiny: TinyFactory) -> None:
    made, found = tiny(), []
    with serving(made.base) as server:
        for steps in (12, 48):  # 3 passes and 12; fewer than 32 steps are never at half the rate
            run = config(kind="ffa", optimizer=OPEN, total_steps=steps)
            with training(made.bundle, server.url, run, random_dataset(VOCABULARY)) as trainer:
                found.append(trainer.find_rate())
    few, many = found
    assert many.size == few.size
    half = rate_for_size("ffa", few.size, halvings=1, on_device=False)
    assert many.lr == float(f"{half:.2g}") < few.lr


@pytest.mark.parametrize("name", ["lora", "bottleneck", "some units"])
def test_what_a_search_puts_on_the_wire_is_the_plans(tiny: TinyFactory, tmp_path: Path, name: str) -> None:
    with trainer_of(tiny, name, tmp_path / "open", **OPEN) as trainer:
        config, before = trainer.config, sum(trainer.traffic)
        tries = trainer.find_rate().tries
        counted = (sum(trainer.traffic) - before) / 1e6
        expected = first_rate_mb(config, trainer.bundle.manifest, random_dataset(VOCABULARY), tries)
    assert expected == pytest.approx(counted, rel=0.15)  # the mean step's, of the data's mean micro-batch
    given = msgspec.structs.replace(config, optimizer=trainer.config.optimizer)
    assert first_rate_mb(given, trainer.bundle.manifest, random_dataset(VOCABULARY), tries) == 0
