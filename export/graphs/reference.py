"""What each graph must compute, in torch, with gradients by autograd: independent of the graphs' own derivations.

In float64, so that it is exact as far as float32 can tell; or in float32, to see how exact torch itself would be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dlora.cloud.model.base_model import EmbeddingEnd, HeadEnd
from dlora.protocol.manifest import GraphKind

Arrays = dict[str, npt.NDArray[np.generic]]
Inputs = Mapping[str, npt.NDArray[np.generic]]
SLAB_VALUES: Final = 1 << 24  # of a head's weight: 128 MB in float64
ADAMW_STEPS: Final = 20
ADAMW_LR, ADAMW_BETAS, ADAMW_EPS, ADAMW_DECAY = 1e-2, (0.9, 0.999), 1e-8, 0.01


def adapter_forward(inputs: Inputs, dtype: torch.dtype = torch.float64) -> Arrays:
    """See ``adapter_graphs``."""
    x, lora_a, lora_b, scale = _tensors(inputs, dtype, "x", "lora_A", "lora_B", "scale")
    return _floats(z=x @ lora_a.T, delta=_delta(x, lora_a, lora_b, scale))


def adapter_input_grad(inputs: Inputs, dtype: torch.dtype = torch.float64) -> Arrays:
    """``dz`` is the gradient by ``z``, ``grad_x`` by ``x``."""
    grad, lora_a, lora_b, scale = _tensors(inputs, dtype, "grad", "lora_A", "lora_B", "scale")
    x = torch.zeros(len(grad), lora_a.shape[1], dtype=dtype, requires_grad=True)
    z = x @ lora_a.T
    dz, grad_x = torch.autograd.grad(scale * (z @ lora_b.T), (z, x), grad)
    return _floats(dz=dz, grad_x=grad_x)


def adapter_weight_grad(inputs: Inputs, lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype = torch.float64) -> Arrays:
    """The gradients by the adapter's weights ``lora_a`` and ``lora_b``, which its graph does not need."""
    x, grad, scale = _tensors(inputs, dtype, "x", "grad", "scale")
    lora_a, lora_b = lora_a.to(dtype).requires_grad_(), lora_b.to(dtype).requires_grad_()
    grad_a, grad_b = torch.autograd.grad(_delta(x, lora_a, lora_b, scale), (lora_a, lora_b), grad)
    return _floats(grad_A=grad_a, grad_B=grad_b)


def embedding(inputs: Inputs, end: EmbeddingEnd) -> Arrays:
    """The base model's own float32 embedding, whatever precision the graph's weight is stored in."""
    return _floats(hidden_states=end(torch.from_numpy(np.asarray(inputs["ids"], np.int64))))


def head(
    inputs: Inputs, end: HeadEnd, kind: GraphKind, dtype: torch.dtype = torch.float64, stored: bool = False
) -> Arrays:
    """The base model's head: with its own weight, or with the ``stored`` one, which may be rounded.

    Instead of ``predictions`` there are the ``logits`` that they come from.
    """
    hidden = torch.from_numpy(np.array(inputs["hidden_states"])).to(dtype).requires_grad_(kind == "head_train")
    weight = torch.from_numpy(np.asarray(inputs["weight"])) if stored else end.weight
    scales = torch.from_numpy(np.asarray(inputs["row_scales"])) if stored and "row_scales" in inputs else None
    size = max(1, SLAB_VALUES // weight.shape[1])
    # A weight of 262,144 rows is large enough as it is: it is widened slab by slab, again for the gradient.
    products = [
        checkpoint(
            _product,
            hidden,
            weight[start : start + size],
            None if scales is None else scales[start : start + size],
            use_reentrant=False,
        )
        for start in range(0, len(weight), size)
    ]
    logits = end.logits(torch.cat(products, dim=1))
    if kind == "head_logits":
        return _floats(logits=logits)
    losses = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(np.asarray(inputs["labels"], np.int64)), reduction="none"
    )
    if kind == "head_loss":
        return _floats(losses=losses, logits=logits)
    (grad,) = torch.autograd.grad(losses.sum() * float(inputs["grad_scale"]), hidden)
    return _floats(losses=losses, grad_hidden_states=grad)


def _product(hidden: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
    wide = weight.to(hidden.dtype)
    return hidden @ (wide if scales is None else wide * scales.to(hidden.dtype)[:, None]).T


def adamw(param: Tensor, grads: Tensor) -> Arrays:
    """``torch.optim.AdamW`` over the steps of ``grads`` (steps, n) from a zero state."""
    weight = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.AdamW([weight], lr=ADAMW_LR, betas=ADAMW_BETAS, eps=ADAMW_EPS, weight_decay=ADAMW_DECAY)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    state = optimizer.state[weight]
    return _floats(new_param=weight, new_exp_avg=state["exp_avg"], new_exp_avg_sq=state["exp_avg_sq"])


def adamw_scalars(step: int) -> Arrays:
    """The scalars that the host passes at step ``step`` (from 1), computed in double."""
    beta1, beta2 = ADAMW_BETAS
    scalars = {
        "decay": 1 - ADAMW_LR * ADAMW_DECAY,
        "beta1": beta1,
        "beta2": beta2,
        "step_size": ADAMW_LR / (1 - beta1**step),
        "sqrt_bias_correction2": (1 - beta2**step) ** 0.5,
        "eps": ADAMW_EPS,
    }
    return {name: np.array(value, np.float32) for name, value in scalars.items()}


def _delta(x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> Tensor:
    return scale * (x @ lora_a.T @ lora_b.T)


def _tensors(inputs: Inputs, dtype: torch.dtype, *names: str) -> list[Tensor]:
    return [torch.from_numpy(np.array(inputs[name])).to(dtype) for name in names]


def _floats(**tensors: Tensor) -> Arrays:
    return {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
