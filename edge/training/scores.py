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

from dlora.protocol.kill_revive import ScoreName

Matrix = npt.NDArray[np.floating[Any]]


class ModuleScore(NamedTuple):
    """One adapter's share of its unit's score.

    Attributes:
        total: a squared norm, or (``sensitivity``) a sum of absolute values.
        elements: numbers that the sum is over; 0 for norms.
    """

    total: float
    elements: int


class Scorer:
    """Computes one kind of score; ``random``, ``static`` and ``last`` need none and give zeros.

    ==============  ===============================================================================
    ``change``      ``||dW_t - dW_{t-1}||_F``, absolute
    ``sensitivity`` mean ``|w·g|`` over A and B (AdaLoRA, arXiv 2303.10512, without its uncertainty term)
    ``grad``        ``||g_B||_F``
    ``norm``        ``||dW||_F``
    ==============  ===============================================================================

    Attributes:
        needs_gradient: whether ``module_score`` needs the gradients of A and B, and so A and B from before the step.
    """

    def __init__(self, score: ScoreName) -> None:
        self.score = score
        self.needs_gradient = score in ("sensitivity", "grad")

    def module_score(
        self,
        *,
        scaling: float,
        lora_A: Matrix,
        lora_B: Matrix,
        previous_A: Matrix | None = None,
        previous_B: Matrix | None = None,
        grad_A: Matrix | None = None,
        grad_B: Matrix | None = None,
    ) -> ModuleScore:
        """Score one adapter: A (rank, in_features), B (out_features, rank), scaling = alpha / rank.

        ``previous_*`` are A and B before the step, ``grad_*`` the step's gradients; all in float32, summed in
        float64. For ``sensitivity`` A and B should be those that the gradients were taken at. Raises
        ``ValueError`` where something that the score needs is missing.
        """
        match self.score:
            case "change":
                if previous_A is None or previous_B is None:
                    raise ValueError("the score 'change' needs previous_A and previous_B")
                return ModuleScore(_change_squared(scaling, lora_A, lora_B, previous_A, previous_B), 0)
            case "norm":
                return ModuleScore(scaling**2 * _product_norm_squared(_double(lora_B), _double(lora_A)), 0)
            case "grad":
                if grad_B is None:
                    raise ValueError("the score 'grad' needs grad_B")
                return ModuleScore(_norm_squared(_double(grad_B)), 0)
            case "sensitivity":
                if grad_A is None or grad_B is None:
                    raise ValueError("the score 'sensitivity' needs grad_A and grad_B")
                total = _absolute_product(lora_A, grad_A) + _absolute_product(lora_B, grad_B)
                return ModuleScore(total, lora_A.size + lora_B.size)
            case _:
                return ModuleScore(0.0, 0)

    def unit_score(self, modules: Iterable[ModuleScore]) -> float:
        """The score of the unit that consists of ``modules``; 0.0 for none."""
        parts = list(modules)
        total = math.fsum(part.total for part in parts)
        if self.score == "sensitivity":
            elements = sum(part.elements for part in parts)
            return total / elements if elements else 0.0
        return math.sqrt(total)


def _change_squared(scaling: float, lora_A: Matrix, lora_B: Matrix, previous_A: Matrix, previous_B: Matrix) -> float:
    """``||s·B·A - s·B'·A'||_F²`` as that of ``[B - B', B'] [A; A - A']``.

    Equal to ``[B, -B'] [A; A']``, but its terms are as small as the step is: nothing large cancels.
    """
    a, b, old_a, old_b = _double(lora_A), _double(lora_B), _double(previous_A), _double(previous_B)
    wide = np.concatenate([b - old_b, old_b], axis=1)  # (out_features, 2·rank)
    tall = np.concatenate([a, a - old_a], axis=0)  # (2·rank, in_features)
    return scaling**2 * _product_norm_squared(wide, tall)


def _product_norm_squared(b: npt.NDArray[np.float64], a: npt.NDArray[np.float64]) -> float:
    """``||B·A||_F² = tr((BᵀB)(AAᵀ))`` for B (out, r), A (r, in): r·r numbers instead of out·in."""
    # Rounding can leave a tiny negative trace where the norm is 0.
    return max(0.0, float(np.sum((b.T @ b) * (a @ a.T))))


def _absolute_product(weights: Matrix, gradient: Matrix) -> float:
    return float(np.abs(weights * gradient).sum(dtype=np.float64))


def _norm_squared(matrix: npt.NDArray[np.float64]) -> float:
    flat = matrix.reshape(-1)
    return float(flat @ flat)


def _double(matrix: Matrix) -> npt.NDArray[np.float64]:
    return matrix.astype(np.float64)
