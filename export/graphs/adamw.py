"""One AdamW step (Loshchilov & Hutter, arXiv 1711.05101), in the order of operations of ``torch.optim.AdamW``.

The host computes ``decay = 1 - lr * weight_decay``, ``step_size = lr / (1 - beta1**t)`` and
``sqrt_bias_correction2 = sqrt(1 - beta2**t)`` in double and passes them as float32: computed in float32 here
they would drift by 5e-6 over 20 steps.

``1 - beta`` needs more care. From ``float32(0.999)`` it comes out 1.3e-5 wrong, where torch starts from the
double. So the graph takes beta for the decimal of seven digits that its float32 stands for, which is as fine as
float32 is near 1, and gets torch's value bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from dlora.protocol.manifest import TensorSpec

from .arrays import Arrays, normal, to_floats
from .golden_case import GoldenCase, GraphWithCases, Materials, Run
from .graph import Computed, TrainingGraph

KINDS: Final = ("adamw",)
TOLERANCE: Final = 2e-7  # about one unit in the last place, after 20 steps; nothing is added up
STEPS: Final = 20
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.999), 1e-8, 0.01
_DIGITS: Final = 1e7

_COMPLEMENT = """
            wide{n} = Cast <to = 11> (beta{n})
            rest{n} = Sub (one, wide{n})
            shifted{n} = Mul (rest{n}, digits)
            whole{n} = Round (shifted{n})
            decimal{n} = Div (whole{n}, digits)
            complement{n} = Cast <to = 1> (decimal{n})
"""


def adamw_graph() -> TrainingGraph:
    """``adamw``: parameters of any shape, flattened to (n,)."""
    vector = [TensorSpec(name, "fp32", ("n",)) for name in ("param", "grad", "exp_avg", "exp_avg_sq")]
    scalars = ("decay", "beta1", "beta2", "step_size", "sqrt_bias_correction2", "eps")
    return TrainingGraph(
        "adamw",
        inputs=(*vector, *(TensorSpec(name, "fp32", ()) for name in scalars)),
        outputs=tuple(TensorSpec(f"new_{spec.name}", "fp32", ("n",)) for spec in vector if spec.name != "grad"),
        body=f"""
            one = Constant <value = double {{1.0}}> ()
            digits = Constant <value = double {{10000000.0}}> ()
            {_COMPLEMENT.format(n=1)}
            {_COMPLEMENT.format(n=2)}
            towards = Sub (grad, exp_avg)
            change = Mul (towards, complement1)
            new_exp_avg = Add (exp_avg, change)
            kept = Mul (exp_avg_sq, beta2)
            weighted = Mul (grad, complement2)
            squared = Mul (weighted, grad)
            new_exp_avg_sq = Add (kept, squared)
            root = Sqrt (new_exp_avg_sq)
            corrected = Div (root, sqrt_bias_correction2)
            denominator = Add (corrected, eps)
            scaled = Mul (new_exp_avg, step_size)
            step = Div (scaled, denominator)
            decayed = Mul (param, decay)
            new_param = Sub (decayed, step)
        """,
        module=partial(Computed, adamw_step),
    )


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    step_size: Tensor,
    sqrt_bias_correction2: Tensor,
    eps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step on flat parameters, in the order of operations of ``adamw_graph``."""
    new_exp_avg = exp_avg + (grad - exp_avg) * _complement(beta1)
    new_exp_avg_sq = exp_avg_sq * beta2 + grad * _complement(beta2) * grad
    denominator = new_exp_avg_sq.sqrt() / sqrt_bias_correction2 + eps
    return param * decay - new_exp_avg * step_size / denominator, new_exp_avg, new_exp_avg_sq


def _complement(beta: Tensor) -> Tensor:
    """``1 - beta`` of beta's decimal of seven digits."""
    return (((1.0 - beta.double()) * _DIGITS).round() / _DIGITS).float()


def reference(param: Tensor, grads: Tensor) -> Arrays:
    """``torch.optim.AdamW`` over the steps of ``grads`` (steps, n) from a zero state."""
    weight = nn.Parameter(param.clone())
    optimizer = torch.optim.AdamW([weight], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    state = optimizer.state[weight]
    return to_floats(new_param=weight, new_exp_avg=state["exp_avg"], new_exp_avg_sq=state["exp_avg_sq"])


def adamw_scalars(step: int) -> Arrays:
    """The scalars that the host passes at step ``step`` (from 1), computed in double."""
    beta1, beta2 = BETAS
    values = {
        "decay": 1 - LR * DECAY,
        "beta1": beta1,
        "beta2": beta2,
        "step_size": LR / (1 - beta1**step),
        "sqrt_bias_correction2": (1 - beta2**step) ** 0.5,
        "eps": EPS,
    }
    return {name: np.array(value, np.float32) for name, value in values.items()}


def adamw_tests(graph: TrainingGraph) -> Iterator[GoldenCase]:
    """The last of 20 steps, each from the state that the engine's own last step left."""
    random = np.random.default_rng(0)
    param, grads = normal(random, 257), normal(random, STEPS, 257)

    def inputs_of_last_step(run: Run) -> Arrays:
        state = {"param": param, "exp_avg": np.zeros_like(param), "exp_avg_sq": np.zeros_like(param)}
        inputs: Arrays = {}
        for step, grad in enumerate(grads, 1):
            if inputs:
                state = dict(zip(state, run(inputs), strict=True))  # type: ignore[arg-type]
            values = {**state, "grad": grad, **adamw_scalars(step)}
            inputs = {spec.name: values[spec.name] for spec in graph.inputs}
        return inputs

    exact = reference(torch.from_numpy(param), torch.from_numpy(grads))
    yield GoldenCase(inputs_of_last_step, exact, dict.fromkeys(exact, TOLERANCE))


def make(_: Materials) -> Iterator[GraphWithCases]:
    """The one graph of this family."""
    graph = adamw_graph()
    yield graph, adamw_tests(graph)
