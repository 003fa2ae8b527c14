"""The device's scores equal those of the dense dW that is never built."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlora.edge.training.scores import Scorer

SCALING = 2.0


def adapter(rng: np.random.Generator, rank: int = 4, inputs: int = 12, outputs: int = 9) -> dict[str, np.ndarray]:
    shapes = {"A": (rank, inputs), "B": (outputs, rank)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def dense(weights: dict[str, np.ndarray]) -> np.ndarray:
    return SCALING * weights["B"].astype(np.float64) @ weights["A"].astype(np.float64)


def change(now: dict[str, np.ndarray], before: dict[str, np.ndarray]) -> float:
    scorer = Scorer("change")
    part = scorer.module_score(
        scaling=SCALING, lora_A=now["A"], lora_B=now["B"], previous_A=before["A"], previous_B=before["B"]
    )
    return scorer.unit_score([part])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rank=st.integers(1, 8),
    inputs=st.integers(1, 20),
    outputs=st.integers(1, 20),
    size=st.sampled_from([1.0, 1e-2, 1e-4, 1e-6]),
)
def test_change_is_the_dense_norm_for_steps_of_any_size(
    seed: int, rank: int, inputs: int, outputs: int, size: float
) -> None:
    rng = np.random.default_rng(seed)
    before = adapter(rng, rank, inputs, outputs)
    moved = adapter(rng, rank, inputs, outputs)
    now = {name: (before[name] + size * moved[name]).astype(np.float32) for name in before}
    np.testing.assert_allclose(change(now, before), np.linalg.norm(dense(now) - dense(before)), rtol=1e-6, atol=1e-12)


def test_change_is_zero_without_a_step_and_the_whole_norm_at_the_first() -> None:
    now = adapter(np.random.default_rng(0))
    assert change(now, now) == 0.0
    untrained = {"A": now["A"], "B": np.zeros_like(now["B"])}
    np.testing.assert_allclose(change(now, untrained), np.linalg.norm(dense(now)), rtol=1e-12)


def test_norm_is_the_dense_norm_of_all_modules_together() -> None:
    rng = np.random.default_rng(1)
    modules = [adapter(rng), adapter(rng, rank=2, outputs=3)]
    scorer = Scorer("norm")
    parts = [scorer.module_score(scaling=SCALING, lora_A=m["A"], lora_B=m["B"]) for m in modules]
    whole = np.concatenate([dense(m).ravel() for m in modules])
    np.testing.assert_allclose(scorer.unit_score(parts), np.linalg.norm(whole), rtol=1e-12)


def test_sensitivity_is_the_mean_over_all_numbers_and_grad_the_norm_of_b() -> None:
    rng = np.random.default_rng(2)
    modules = [(adapter(rng), adapter(rng)), (adapter(rng, outputs=3), adapter(rng, outputs=3))]
    scores = {}
    for name in ("sensitivity", "grad"):
        scorer = Scorer(name)
        assert scorer.needs_gradient
        scores[name] = scorer.unit_score(
            scorer.module_score(scaling=SCALING, lora_A=w["A"], lora_B=w["B"], grad_A=g["A"], grad_B=g["B"])
            for w, g in modules
        )
    products = np.concatenate([np.abs(w[n] * g[n]).ravel() for w, g in modules for n in "AB"])
    gradients = np.concatenate([g["B"].ravel() for _, g in modules])
    np.testing.assert_allclose(scores["sensitivity"], products.mean(dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(scores["grad"], np.linalg.norm(gradients.astype(np.float64)), rtol=1e-12)


@pytest.mark.parametrize("score", ["random", "static", "last"])
def test_policies_that_ignore_scores_cost_nothing(score: str) -> None:
    scorer = Scorer(score)
    weights = adapter(np.random.default_rng(3))
    part = scorer.module_score(scaling=SCALING, lora_A=weights["A"], lora_B=weights["B"])
    assert scorer.unit_score([part, part]) == 0.0
    assert not scorer.needs_gradient


@pytest.mark.parametrize("score", ["change", "sensitivity", "grad"])
def test_what_a_score_needs_must_be_there(score: str) -> None:
    weights = adapter(np.random.default_rng(4))
    with pytest.raises(ValueError, match=score):
        Scorer(score).module_score(scaling=SCALING, lora_A=weights["A"], lora_B=weights["B"])


@pytest.mark.parametrize("score", ["change", "sensitivity", "grad", "norm", "last"])
def test_a_unit_without_adapters_scores_zero(score: str) -> None:
    assert Scorer(score).unit_score([]) == 0.0
