"""The device's scores equal those of the dense dW that is never built."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlora.edge.adapters.kind import Parameter
from dlora.edge.adapters.lora import LoraGroup, LoraModule
from dlora.edge.training.scores import Scorer

SCALING = 2.0


def adapter(rng: np.random.Generator, rank: int = 4, inputs: int = 12, outputs: int = 9) -> dict[str, np.ndarray]:
    shapes = {"A": (rank, inputs), "B": (outputs, rank)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def lora(*modules: dict[str, np.ndarray]) -> LoraGroup:
    named = [
        LoraModule(str(index), Parameter.of(each["A"]), Parameter.of(each["B"])) for index, each in enumerate(modules)
    ]
    return LoraGroup(named, SCALING)


def dense(weights: dict[str, np.ndarray]) -> np.ndarray:
    return SCALING * weights["B"].astype(np.float64) @ weights["A"].astype(np.float64)


def change(now: dict[str, np.ndarray], before: dict[str, np.ndarray]) -> float:
    group = lora(before)
    scorer = Scorer("change")
    remembered = scorer.before(group)
    group.modules[0].lora_A.value, group.modules[0].lora_B.value = now["A"], now["B"]
    return scorer.unit_score(scorer.parts(group, remembered))


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
    group = lora(*modules)
    parts = scorer.parts(group, scorer.before(group))
    whole = np.concatenate([dense(m).ravel() for m in modules])
    np.testing.assert_allclose(scorer.unit_score(parts), np.linalg.norm(whole), rtol=1e-12)


def test_sensitivity_is_the_mean_over_all_numbers_and_grad_the_norm_of_b() -> None:
    rng = np.random.default_rng(2)
    modules = [(adapter(rng), adapter(rng)), (adapter(rng, outputs=3), adapter(rng, outputs=3))]
    scores = {}
    for name in ("sensitivity", "grad"):
        scorer, group = Scorer(name), lora(*(weights for weights, _ in modules))
        for module, (_, grads) in zip(group.modules, modules, strict=True):
            module.lora_A.grad, module.lora_B.grad = grads["A"], grads["B"]
        before = scorer.before(group)
        for parameter in group.parameters().values():  # a step, which these scores do not see
            parameter.value = parameter.value + 1
        scores[name] = scorer.unit_score(scorer.parts(group, before))
    products = np.concatenate([np.abs(w[n] * g[n]).ravel() for w, g in modules for n in "AB"])
    gradients = np.concatenate([g["B"].ravel() for _, g in modules])
    np.testing.assert_allclose(scores["sensitivity"], products.mean(dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(scores["grad"], np.linalg.norm(gradients.astype(np.float64)), rtol=1e-12)


@pytest.mark.parametrize("score", ["random", "static", "last"])
def test_policies_without_scores_compute_nothing(score: str) -> None:
    scorer, group = Scorer(score), lora(adapter(np.random.default_rng(3)))
    before = scorer.before(group)
    assert before.changes == []
    assert scorer.unit_score(scorer.parts(group, before)) == 0.0


@pytest.mark.parametrize("score", ["change", "sensitivity", "grad", "norm", "last"])
def test_a_unit_without_adapters_scores_zero(score: str) -> None:
    assert Scorer(score).unit_score([]) == 0.0
