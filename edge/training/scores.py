"""Scores of units, computed on the device: how much a unit's adapters matter now. The cloud ranks by them.

A unit is one or more adapters with ``dW = scaling · B · A``; ``dW`` itself is never built. Every score is combined
from its adapters as a whole (a Frobenius norm over all of them, a mean over all their numbers), so it does not
depend on how a unit is cut into modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dlora.edge.adapters.kind import Change, GroupAdapters
from dlora.protocol.choices import ScoreName
from dlora.protocol.tensors import FloatArray

Matrix = npt.NDArray[np.floating[Any]]


class ScorePart(NamedTuple):
    """A share of a unit's score.

    Attributes:
        total: a squared norm, or (``sensitivity``) a sum of absolute values.
        elements: numbers that the sum is over; 0 for norms.
    """

    total: float
    elements: int = 0


class BeforeStep(NamedTuple):
    """What scores need of a group's adapters from before a step.

    Attributes:
        changes: as ``GroupAdapters.changes``; values: of each parameter, by name.
    """

    changes: list[Change]
    values: dict[str, FloatArray]


class Scorer:
    """Computes one kind of score; ``random``, ``static`` and ``last`` need none and give zeros.

    ==============  ===============================================================================
    ``change``      ``||dW_t - dW_{t-1}||_F``, absolute
    ``sensitivity`` mean ``|w·g|`` over all parameters (AdaLoRA, arXiv 2303.10512, without its uncertainty term), at the
                    weights that the gradients were taken at
    ``grad``        ``||g||_F`` of what is nearest to the output; of LoRA, B
    ``norm``        ``||dW||_F``
    ==============  ===============================================================================
    """

    def __init__(self, score: ScoreName) -> None:
        self.score = score

    def before(self, group: GroupAdapters) -> BeforeStep:
        """Remember a group before a step. Steps replace arrays and never write into them, so it costs no copies."""
        changes = group.changes() if self.score == "change" else []
        values = {name: parameter.value for name, parameter in group.parameters().items()}
        return BeforeStep(changes, values)

    def parts(self, group: GroupAdapters, before: BeforeStep) -> list[ScorePart]:
        """A group's shares after a step, its gradients still there; float32 is summed in float64."""
        match self.score:
            case "change":
                pairs = zip(group.changes(), before.changes, strict=True)
                return [ScorePart(change_squared(after, old)) for after, old in pairs]
            case "norm":
                return [ScorePart(norm_squared(change)) for change in group.changes()]
            case "grad":
                parameters = group.parameters()
                grads = [parameters[name].grad for name in group.scored_by_gradient()]
                return [ScorePart(_squares(_double(grad))) for grad in grads if grad is not None]
            case "sensitivity":
                return [
                    ScorePart(_absolute_product(before.values[name], parameter.grad), parameter.grad.size)
                    for name, parameter in group.parameters().items()
                    if parameter.grad is not None
                ]
            case _:
                return []

    def unit_score(self, parts: Iterable[ScorePart]) -> float:
        """The score of the unit that consists of ``parts``; 0.0 for none."""
        parts = list(parts)
        total = math.fsum(part.total for part in parts)
        if self.score == "sensitivity":
            elements = sum(part.elements for part in parts)
            return total / elements if elements else 0.0
        return math.sqrt(total)


def norm_squared(factors: Change) -> float:
    """``||scaling·B·A||_F²``."""
    if factors.lora_A is None:
        return factors.scaling**2 * _elementwise_squares(_double(factors.lora_B))
    return factors.scaling**2 * _product_norm_squared(_double(factors.lora_B), _double(factors.lora_A))


def change_squared(after: Change, before: Change) -> float:
    """``||s·B·A - s·B'·A'||_F²`` as that of ``[B - B', B'] [A; A - A']``.

    Equal to ``[B, -B'] [A; A']``, but its terms are as small as the step is: nothing large cancels.
    """
    if after.lora_A is None or before.lora_A is None:  # both, or neither: they are of one group
        return after.scaling**2 * _elementwise_squares(_double(after.lora_B) - _double(before.lora_B))
    a, b, old_a, old_b = (_double(m) for m in (after.lora_A, after.lora_B, before.lora_A, before.lora_B))
    wide = np.concatenate([b - old_b, old_b], axis=1)  # (out_features, 2·rank)
    tall = np.concatenate([a, a - old_a], axis=0)  # (2·rank, in_features)
    return after.scaling**2 * _product_norm_squared(wide, tall)


def _product_norm_squared(b: npt.NDArray[np.float64], a: npt.NDArray[np.float64]) -> float:
    """``||B·A||_F² = tr((BᵀB)(AAᵀ))`` for B (out, r), A (r, in): r·r numbers instead of out·in."""
    # Rounding can leave a tiny negative trace where the norm is 0.
    return max(0.0, float(np.sum((b.T @ b) * (a @ a.T))))


def _absolute_product(weights: Matrix, gradient: Matrix) -> float:
    return float(np.abs(weights * gradient).sum(dtype=np.float64))


def _elementwise_squares(matrix: npt.NDArray[np.float64]) -> float:
    """Not as a product: BLAS takes threads for so many numbers, and they spin for longer than they compute."""
    return float(np.square(matrix).sum())


def _squares(matrix: npt.NDArray[np.float64]) -> float:
    flat = matrix.reshape(-1)
    return float(flat @ flat)


def _double(matrix: Matrix) -> npt.NDArray[np.float64]:
    return matrix.astype(np.float64)
