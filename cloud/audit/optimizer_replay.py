"""What was trained, from the gradients alone: a server that sees every gradient can step the optimiser itself.

Of the kinds ``bottleneck`` and ``ffa`` what is trained begins at zero, its gradient is the product of two tensors that
crossed, and AdamW is a formula. Neither learning rate, schedule nor weight decay need be known: of each step

    E_t = a E_(t-1) + b U_(t-1)        U: AdamW's direction, from the gradients so far

has two unknown numbers, common to all groups, and the rows that cross at step t give them. So a server knows what was
trained after a few steps, however few rows a step has. Adapters of the kind ``lora`` begin with an A that the server
has not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

BETAS: Final = (0.9, 0.999)
EPS: Final = 1e-8
SCALINGS: Final = (1.0, 2.0, 4.0, 0.5)
"""What gradients are multiplied by on the device: it matters where they are clipped, and the best one is taken."""


@dataclass(frozen=True)
class StepSeen:
    """One optimizer step.

    Attributes:
        rows: of each parameter, what crossed while it had the value before this step: inputs (rows, in) and outputs
            (rows, out), ``outputs = inputs E^T``.
        grads: of each parameter (out, in), summed over the step, without the scaling; none of those that rest.
    """

    rows: Mapping[str, tuple[Tensor, Tensor]]
    grads: Mapping[str, Tensor]


@dataclass
class _Moments:
    first: Tensor
    second: Tensor
    steps: int = 0


@dataclass
class Replayed:
    """What the replay found.

    Attributes:
        values: of each parameter, times the scaling, before the last step.
        residual: how much of what crossed it does not explain: norm over norm.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    residual: float = 1.0


def replay(steps: Sequence[StepSeen]) -> Replayed:
    """Step AdamW through a run from its first step on."""
    return min((_replay(steps, scaling) for scaling in SCALINGS), key=lambda each: each.residual)


def _replay(steps: Sequence[StepSeen], scaling: float) -> Replayed:
    values: dict[str, Tensor] = {}
    moments: dict[str, _Moments] = {}
    directions: dict[str, Tensor] = {}
    missed = seen = 0.0
    for step in steps:
        if directions:
            values = _fit(values, directions, step.rows)
        for name, (inputs, outputs) in step.rows.items():
            found = inputs @ values[name].T if name in values else torch.zeros_like(outputs)
            missed += float((outputs - found).double().square().sum())
            seen += float(outputs.double().square().sum())
        directions = _directions(step.grads, moments, scaling)
    return Replayed(values, (missed / seen) ** 0.5 if seen else 1.0)


def _directions(grads: Mapping[str, Tensor], moments: dict[str, _Moments], scaling: float) -> dict[str, Tensor]:
    """AdamW's (Loshchilov & Hutter, arXiv 1711.05101), after clipping all gradients together to a norm of 1."""
    norm = scaling * sum(float(grad.double().square().sum()) for grad in grads.values()) ** 0.5
    clip = scaling * min(1.0, 1.0 / (norm + 1e-6))
    directions = {}
    for name, grad in grads.items():
        clipped = grad * clip
        kept = moments.setdefault(name, _Moments(torch.zeros_like(grad), torch.zeros_like(grad)))
        kept.steps += 1
        kept.first = BETAS[0] * kept.first + (1 - BETAS[0]) * clipped
        kept.second = BETAS[1] * kept.second + (1 - BETAS[1]) * clipped.square()
        first, second = kept.first / (1 - BETAS[0] ** kept.steps), kept.second / (1 - BETAS[1] ** kept.steps)
        directions[name] = first / (second.sqrt() + EPS)
    return directions


def _fit(
    values: Mapping[str, Tensor], directions: Mapping[str, Tensor], rows: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The values after a step: the two numbers that explain best what crossed then."""
    squares = torch.zeros(2, 2, dtype=torch.float64)
    products = torch.zeros(2, dtype=torch.float64)
    for name, (inputs, outputs) in rows.items():
        if name not in directions:
            continue
        old = values.get(name, torch.zeros_like(directions[name]))
        basis = torch.stack([(inputs @ each.T).double().flatten() for each in (old, directions[name])])
        squares += basis @ basis.T
        products += basis @ outputs.double().flatten()
    keep, rate = (torch.linalg.pinv(squares, rtol=1e-12) @ products).tolist()
    if not values:
        keep = 1.0
    moved = {
        name: keep * values.get(name, torch.zeros_like(direction)) + rate * direction
        for name, direction in directions.items()
    }
    return {**values, **moved}
