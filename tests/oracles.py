"""What graphs must compute, in plain torch, float64 and autograd; and how far from it they may be.

Nothing here is the exporter's: a mistake in its references or its tolerances is then seen by the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

# A float32 is exact to 6e-8, and the sums of these tests have some hundred terms: a few 1e-7, and room for the order.
SUMS: Final = 2e-6
# The softmax of a head: its exponentials are off by some units in the last place each, and its gradient cancels.
HEAD: Final = 1e-5
# AdamW adds up nothing, but twenty steps in float32 leave the path of float64 by a unit in the last place each.
ADAMW: Final = 2e-6
# What a rounded weight costs beside: half a unit of 11 bits (5e-4) or of 8 (4e-3) in each of its numbers, some of it in
# the differences that a loss and a gradient are.
ROUNDING: Final = {"fp32": 0.0, "fp16": 2e-3, "int8": 5e-2, "int4": 0.5}


def expected(
    kind: str, inputs: Mapping[str, Array], *, embedding_scale: float = 1.0, logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Arrays:  # fmt: skip
    """The outputs of a graph of this kind, by name."""
    given = {name: _wide(value) for name, value in inputs.items()}
    match kind:
        case "adapter_forward":
            found = _adapter_forward(**given)
        case "adapter_input_grad":
            found = _adapter_input_grad(**given)
        case "adapter_weight_grad":
            found = _adapter_weight_grad(**given)
        case "core_forward":
            found = {"out": given["scale"] * (given["z"] @ given["core"].T)}
        case "core_input_grad":
            found = {"dz": given["scale"] * (given["grad"] @ given["core"])}
        case "core_weight_grad":
            found = {"grad_core": given["scale"] * (given["grad"].T @ given["z"])}
        case "adamw":
            found = _adamw(**given)
        case "embedding":
            table = _stored(given["weight"], given.get("row_scales"), given.get("group_scales"))
            found = {"hidden_states": embedding_scale * table[given["ids"]]}
        case "head_train" | "head_loss" | "head_logits":
            found = _head(logit_scale=logit_scale, softcap=softcap, **given)
        case _:
            raise AssertionError(f"no oracle for {kind}")
    return {name: value.detach().numpy() for name, value in found.items()}


def relative_error(found: Array, wanted: Array) -> float:
    """The largest difference, as a part of the largest magnitude that is wanted."""
    assert found.shape == wanted.shape
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())


def assert_near(found: Mapping[str, Array], wanted: Mapping[str, Array], tolerance: float) -> None:
    """All that was found, but predictions, which are no numbers to be near to."""
    for name, value in found.items():
        if name != "predictions":
            assert relative_error(value, wanted[name]) <= tolerance, name


def assert_predicts(predictions: Array, logits: Array, tolerance: float = HEAD) -> None:
    """The best token of each row, or one that is as good but for rounding."""
    chosen = np.take_along_axis(logits, predictions[:, None], axis=1)[:, 0]
    assert (logits.max(axis=1) - chosen).max() <= tolerance * np.abs(logits).max()


def adamw_steps(
    param: Array, grads: Array, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Arrays:
    """As the paper has it (arXiv 1711.05101, algorithm 2), with the decay of torch: by lr."""
    value, first, second = _wide(param), torch.zeros(param.shape).double(), torch.zeros(param.shape).double()
    for step, grad in enumerate(_wide(grads), 1):
        first = betas[0] * first + (1 - betas[0]) * grad
        second = betas[1] * second + (1 - betas[1]) * grad**2
        corrected = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
        value = value - lr * weight_decay * value - lr * corrected[0] / (corrected[1].sqrt() + eps)
    return {"new_param": value.numpy(), "new_exp_avg": first.numpy(), "new_exp_avg_sq": second.numpy()}


def _wide(value: Array) -> Tensor:
    tensor = torch.from_numpy(np.array(value))
    return tensor if tensor.dtype == torch.int64 else tensor.double()


def _stored(weight: Tensor, row_scales: Tensor | None, group_scales: Tensor | None) -> Tensor:
    """(rows, width) of a weight and its scales, if any. Two numbers of four bits stand in a byte, low ones first."""
    if group_scales is not None:
        packed = weight.to(torch.int16)
        return (torch.cat([(packed & 15) - 8, packed >> 4], 2) * group_scales).flatten(1)
    return weight if row_scales is None else weight * row_scales[:, None]


def _delta(x: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    z = x @ a.T
    return z, scale * (z @ b.T)


def _adapter_forward(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor) -> dict[str, Tensor]:
    z, delta = _delta(x, lora_A, lora_B, scale)
    return {"z": z, "delta": delta}


def _adapter_input_grad(grad: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor) -> dict[str, Tensor]:
    x = torch.zeros(len(grad), lora_A.shape[1], dtype=torch.float64, requires_grad=True)
    z, delta = _delta(x, lora_A, lora_B, scale)
    dz, grad_x = torch.autograd.grad(delta, (z, x), grad)
    return {"dz": dz, "grad_x": grad_x}


def _adapter_weight_grad(x: Tensor, z: Tensor, grad: Tensor, dz: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Both products are linear in their weight, so that any weight has the same gradient."""
    a = torch.zeros(z.shape[1], x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(grad.shape[1], z.shape[1], dtype=torch.float64, requires_grad=True)
    (grad_a,) = torch.autograd.grad(x @ a.T, a, dz)
    (grad_b,) = torch.autograd.grad(scale * (z @ b.T), b, grad)
    return {"grad_A": grad_a, "grad_B": grad_b}


def _adamw(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, decay: Tensor, beta1: Tensor, beta2: Tensor,
    step_size: Tensor, sqrt_bias_correction2: Tensor, eps: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """One step. The betas came as float32, and stand for the decimals that a user wrote."""
    decimal1, decimal2 = (round(float(beta), 7) for beta in (beta1, beta2))
    first = decimal1 * exp_avg + (1 - decimal1) * grad
    second = decimal2 * exp_avg_sq + (1 - decimal2) * grad**2
    value = decay * param - step_size * first / (second.sqrt() / sqrt_bias_correction2 + eps)
    return {"new_param": value, "new_exp_avg": first, "new_exp_avg_sq": second}


def _head(
    weight: Tensor, hidden_states: Tensor, logit_scale: float, softcap: float | None,
    row_scales: Tensor | None = None, group_scales: Tensor | None = None, bias: Tensor | None = None,
    labels: Tensor | None = None, grad_scale: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    weight = _stored(weight, row_scales, group_scales)
    hidden_states = hidden_states.requires_grad_()
    logits = logit_scale * torch.nn.functional.linear(hidden_states, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    found = {"logits": logits}
    if labels is not None:
        found["losses"] = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        if grad_scale is not None:
            (found["grad_hidden_states"],) = torch.autograd.grad(found["losses"].sum() * grad_scale, hidden_states)
    return found
