"""What each graph must compute, in torch, with gradients by autograd: independent of the graphs' own derivations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dlora.cloud.base_model import EmbeddingEnd, HeadEnd
from dlora.protocol.manifest import GraphKind

Arrays = dict[str, npt.NDArray[np.generic]]
Reference = Callable[[Mapping[str, npt.NDArray[np.generic]]], Arrays]
ADAMW_STEPS: Final = 20
ADAMW_LR, ADAMW_BETAS, ADAMW_EPS, ADAMW_DECAY = 1e-2, (0.9, 0.999), 1e-8, 0.01


def adapter_forward(inputs: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
    """See ``adapter_graphs``; in double, so that the error measured is the graph's alone."""
    x, lora_a, lora_b, scale = _double(inputs, "x", "lora_A", "lora_B", "scale")
    return _floats(z=x @ lora_a.T, delta=_delta(x, lora_a, lora_b, scale))


def adapter_input_grad(inputs: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
    """``dz`` is the gradient by ``z``, ``grad_x`` by ``x``."""
    grad, lora_a, lora_b, scale = _double(inputs, "grad", "lora_A", "lora_B", "scale")
    x = torch.zeros(len(grad), lora_a.shape[1], dtype=torch.float64, requires_grad=True)
    z = x @ lora_a.T
    dz, grad_x = torch.autograd.grad(scale * (z @ lora_b.T), (z, x), grad)
    return _floats(dz=dz, grad_x=grad_x)


def adapter_weight_grad(inputs: Mapping[str, npt.NDArray[np.generic]], lora_a: Tensor, lora_b: Tensor) -> Arrays:
    """The gradients by the adapter's weights ``lora_a`` and ``lora_b``, which its graph does not need."""
    x, grad, scale = _double(inputs, "x", "grad", "scale")
    lora_a, lora_b = lora_a.double().requires_grad_(), lora_b.double().requires_grad_()
    grad_a, grad_b = torch.autograd.grad(_delta(x, lora_a, lora_b, scale), (lora_a, lora_b), grad)
    return _floats(grad_A=grad_a, grad_B=grad_b)


def embedding(inputs: Mapping[str, npt.NDArray[np.generic]], end: EmbeddingEnd) -> Arrays:
    """The base model's own float32 embedding, whatever precision the graph's weight is stored in."""
    return _floats(hidden_states=end(torch.from_numpy(np.asarray(inputs["ids"], np.int64))))


def head(inputs: Mapping[str, npt.NDArray[np.generic]], end: HeadEnd, kind: GraphKind) -> Arrays:
    """The base model's own float32 head, whatever precision the graph's weight is stored in."""
    hidden = torch.from_numpy(np.array(inputs["hidden_states"], np.float32)).requires_grad_(kind == "head_train")
    logits = end(hidden)
    if kind == "head_logits":
        return _floats(logits=logits)
    losses = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(np.asarray(inputs["labels"], np.int64)), reduction="none"
    )
    if kind == "head_loss":
        return {**_floats(losses=losses), "predictions": logits.argmax(1).numpy()}
    (grad,) = torch.autograd.grad(losses.sum() * float(inputs["grad_scale"]), hidden)
    return _floats(losses=losses, grad_hidden_states=grad)


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


def _double(inputs: Mapping[str, npt.NDArray[np.generic]], *names: str) -> list[Tensor]:
    return [torch.from_numpy(np.array(inputs[name], np.float64)) for name in names]


def _floats(**tensors: Tensor) -> Arrays:
    return {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
