"""What torch computes on this machine, for ``device_maths.py`` to find again on another, where there is no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from dlora.edge.engine.bundle import Bundle

ADAMW_STEPS = 20
LR, WEIGHT_DECAY = 1e-2, 0.1
RANKS = (4, 7)
TOKENS = 11
LABELLED = 5
SCALING = 2.0


def write_reference(bundle: Bundle, path: Path) -> None:
    """Inputs and torch's outputs for the first group's adapters at two ranks, AdamW, and the head."""
    torch.manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    for rank in RANKS:
        tensors |= {f"{rank}.{name}": value for name, value in _group(bundle, rank).items()}
    tensors |= _adamw() | _head(bundle)
    save_file({name: np.ascontiguousarray(value.detach().numpy()) for name, value in tensors.items()}, path)


def _group(bundle: Bundle, rank: int) -> dict[str, torch.Tensor]:
    group = bundle.manifest.groups[0]
    x = torch.randn(TOKENS, group.in_features, requires_grad=True)
    tensors = {"x": x}
    total = torch.zeros(())
    for index, target in enumerate(group.targets):
        lora_a = torch.randn(rank, group.in_features, requires_grad=True)
        lora_b = torch.randn(target.out_features, rank, requires_grad=True)
        grad = torch.randn(TOKENS, target.out_features)
        delta = SCALING * (x @ lora_a.T) @ lora_b.T
        total = total + (delta * grad).sum()
        tensors |= {f"{index}.A": lora_a, f"{index}.B": lora_b, f"{index}.grad": grad, f"{index}.delta": delta}
    total.backward()
    for name in list(tensors):
        if name.endswith((".A", ".B")):
            tensors[f"{name}.grad"] = _grad(tensors[name])
    return tensors | {"x.grad": _grad(x)}


def _adamw() -> dict[str, torch.Tensor]:
    value = torch.nn.Parameter(torch.randn(13, 5))
    grads = torch.randn(ADAMW_STEPS, 13, 5)
    start = value.detach().clone()
    optimizer = torch.optim.AdamW([value], lr=LR, weight_decay=WEIGHT_DECAY)
    for grad in grads:
        value.grad = grad.clone()
        optimizer.step()
    return {"adamw.start": start, "adamw.grads": grads, "adamw.end": value}


def _head(bundle: Bundle) -> dict[str, torch.Tensor]:
    weight = torch.from_numpy(np.array(bundle.weight(bundle.manifest.head.weight)))
    hidden = torch.randn(LABELLED, weight.shape[1], requires_grad=True)
    labels = torch.randint(0, weight.shape[0], (LABELLED,))
    loss = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    loss.sum().backward()
    return {"head.hidden": hidden, "head.labels": labels, "head.loss": loss, "head.grad": _grad(hidden)}


def _grad(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad
