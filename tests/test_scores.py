"""The device's scores: their formulas, over all of a unit's modules together."""

from __future__ import annotations

import numpy as np
import pytest

from dlora.edge.adapters.kind import Parameter
from dlora.edge.adapters.lora import LoraGroup, LoraModule
from dlora.edge.training.scores import unit_score
from dlora.protocol.choices import ScoreName

SCALING = 2.0


def adapter(rng: np.random.Generator, rank: int = 4, inputs: int = 12, outputs: int = 9) -> dict[str, np.ndarray]:
    shapes = {"A": (rank, inputs), "B": (outputs, rank)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def lora(*modules: dict[str, np.ndarray]) -> LoraGroup:
    named = [
        LoraModule(str(index), Parameter.of(each["A"]), Parameter.of(each["B"])) for index, each in enumerate(modules)
    ]
    return LoraGroup(named, SCALING)


def test_sensitivity_is_the_mean_over_all_numbers_and_grad_the_norm_of_b() -> None:
    rng = np.random.default_rng(2)
    modules = [(adapter(rng), adapter(rng)), (adapter(rng, outputs=3), adapter(rng, outputs=3))]
    group = lora(*(weights for weights, _ in modules))
    for module, (_, grads) in zip(group.modules, modules, strict=True):
        module.lora_A.grad, module.lora_B.grad = grads["A"], grads["B"]
    scores = {name: unit_score(name, [group]) for name in ("sensitivity", "grad")}
    products = np.concatenate([np.abs(w[n] * g[n]).ravel() for w, g in modules for n in "AB"])
    gradients = np.concatenate([g["B"].ravel() for _, g in modules])
    np.testing.assert_allclose(scores["sensitivity"], products.mean(dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(scores["grad"], np.linalg.norm(gradients.astype(np.float64)), rtol=1e-12)


@pytest.mark.parametrize("score", ["random", "static"])
def test_without_a_score_it_is_zero(score: ScoreName) -> None:
    group = lora(adapter(np.random.default_rng(3)))
    for parameter in group.parameters().values():
        parameter.grad = np.ones_like(parameter.value)
    assert unit_score(score, [group]) == 0.0


@pytest.mark.parametrize("score", ["sensitivity", "grad"])
def test_a_unit_without_adapters_scores_zero(score: ScoreName) -> None:
    assert unit_score(score, []) == 0.0
