"""The small training graphs as torch modules with explicit gradients: what ExecuTorch programs are made of.

Each computes what the ONNX text of its kind computes, from the same inputs in the same order. They are written for
ExecuTorch's kernels: ``linear`` and ``mm`` with the long side untransposed, since a transpose is a copy there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DIGITS = 1e7


class AdapterForward(nn.Module):
    """``z = x A^T`` (tokens, rank) and ``delta = scale * z B^T`` (tokens, out)."""

    def forward(self, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        z = nn.functional.linear(x, lora_a)
        return z, nn.functional.linear(z * scale, lora_b)


class AdapterInputGrad(nn.Module):
    """``dz = scale * grad B`` (tokens, rank) and ``grad_x = dz A`` (tokens, in)."""

    def forward(self, grad: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        dz = torch.mm(grad, lora_b) * scale
        return dz, torch.mm(dz, lora_a)


class AdapterWeightGrad(nn.Module):
    """``grad_A = dz^T x`` (rank, in) and ``grad_B = scale * grad^T z`` (out, rank)."""

    def forward(self, x: Tensor, z: Tensor, grad: Tensor, dz: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        # (z^T grad)^T and not grad^T z: it transposes what has rank columns, not what has out.
        return torch.mm(dz.t(), x), torch.mm((z * scale).t(), grad).t()


class AdamW(nn.Module):
    """One step on flat parameters, in the order of operations of ``adamw_graph``."""

    def forward(
        self,
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
        new_exp_avg = exp_avg + (grad - exp_avg) * _complement(beta1)
        new_exp_avg_sq = exp_avg_sq * beta2 + grad * _complement(beta2) * grad
        denominator = new_exp_avg_sq.sqrt() / sqrt_bias_correction2 + eps
        return param * decay - new_exp_avg * step_size / denominator, new_exp_avg, new_exp_avg_sq


def _complement(beta: Tensor) -> Tensor:
    """``1 - beta`` of beta's decimal of seven digits: see ``adamw_graph``."""
    return (((1.0 - beta.double()) * DIGITS).round() / DIGITS).float()


class Embedding(nn.Module):
    """The rows of ``weight`` (vocabulary, embedding_size) that ``ids`` (tokens,) name, in float32, times ``scale``."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, weight: Tensor, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, weight).float()
        return rows * self.scale
