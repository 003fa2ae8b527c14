"""What differential privacy may be claimed for Gaussian noise: the exact ε, or none."""

from __future__ import annotations

import math
from typing import Final

import torch

DELTA: Final = 1e-5


def epsilon_of(sensitivity: float, deviation: float, delta: float = DELTA) -> float:
    """The smallest ε for which noise of this standard deviation is (ε, δ)-differentially private.

    ``sensitivity``: the largest Euclidean distance of two values that a neighbour may have in place of each other. The
    analytic Gaussian mechanism, Balle & Wang, arXiv 1805.06530, theorem 8.
    """
    if deviation <= 0:
        return math.inf
    ratio = sensitivity / deviation
    low, high = 0.0, 1.0
    while _delta_of(high, ratio) > delta:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta_of(middle, ratio) > delta else (low, middle)
    return high


def _delta_of(epsilon: float, ratio: float) -> float:
    first, second = (
        float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))
        for x in (ratio / 2 - epsilon / ratio, -ratio / 2 - epsilon / ratio)
    )
    return math.exp(first) - math.exp(min(0.0, epsilon + second))  # the product is a share; rounding may lift it
