"""The graphs of a LoRA adapter: its forward pass, and its backward pass in two halves.

::

    forward        z  = x A^T               delta  = scale * z B^T
    input_grad     dz = scale * grad B      grad_x = dz A
    weight_grad    grad_A = dz^T x          grad_B = scale * grad^T z

with x (tokens, in), A (rank, in), B (out, rank), z and dz (tokens, rank), delta and grad (tokens, out), and
scale = alpha / rank: LoRA (Hu et al., arXiv 2106.09685, section 4.1), as PEFT computes it. Number of tokens
and rank are dynamic, so one graph serves all adapters of a shape.

The graphs are written for what a rank is: small. Products stand so that the rank is the short side of a wide matrix,
not of a tall one, which matrix kernels are bad at, and ``scale`` goes over something as narrow as the rank, never over
(tokens, out): that alone took more time than the products (docs/log/experiments.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from dlora.protocol.manifest import TensorSpec, adapter_key

from .arrays import Arrays, Inputs, normal, to_floats, to_tensors
from .golden_case import GoldenCase, GraphWithCases, Materials
from .graph import TrainingGraph
from .tolerances import allowed

KINDS: Final = ("adapter_forward", "adapter_input_grad", "adapter_weight_grad")
TOKENS: Final = 7


def adapter_graphs(in_features: int, out_features: int) -> tuple[TrainingGraph, ...]:
    """``adapter_forward``, ``adapter_input_grad`` and ``adapter_weight_grad`` of one shape."""
    key = adapter_key(in_features, out_features)
    x = TensorSpec("x", "fp32", ("tokens", in_features))
    grad = TensorSpec("grad", "fp32", ("tokens", out_features))
    z = TensorSpec("z", "fp32", ("tokens", "rank"))
    dz = TensorSpec("dz", "fp32", ("tokens", "rank"))
    lora_a = TensorSpec("lora_A", "fp32", ("rank", in_features))
    lora_b = TensorSpec("lora_B", "fp32", (out_features, "rank"))
    scale = TensorSpec("scale", "fp32", ())
    forward = TrainingGraph(
        "adapter_forward",
        inputs=(x, lora_a, lora_b, scale),
        outputs=(z, TensorSpec("delta", "fp32", ("tokens", out_features))),
        body="""
            z_by_rank = Gemm <transB = 1> (lora_A, x)
            z = Transpose <perm = [1, 0]> (z_by_rank)
            scaled_z = Mul (z, scale)
            delta = Gemm <transB = 1> (scaled_z, lora_B)
        """,
        module=AdapterForward,
        key=key,
    )
    input_grad = TrainingGraph(
        "adapter_input_grad",
        inputs=(grad, lora_a, lora_b, scale),
        outputs=(dz, TensorSpec("grad_x", "fp32", ("tokens", in_features))),
        body="""
            gradB = MatMul (grad, lora_B)
            dz = Mul (gradB, scale)
            grad_x = MatMul (dz, lora_A)
        """,
        module=AdapterInputGrad,
        key=key,
    )
    weight_grad = TrainingGraph(
        "adapter_weight_grad",
        inputs=(x, z, grad, dz, scale),
        outputs=(
            TensorSpec("grad_A", "fp32", ("rank", in_features)),
            TensorSpec("grad_B", "fp32", (out_features, "rank")),
        ),
        body="""
            dz_by_rank = Transpose <perm = [1, 0]> (dz)
            grad_A = MatMul (dz_by_rank, x)
            z_by_rank = Transpose <perm = [1, 0]> (z)
            zgrad = MatMul (z_by_rank, grad)
            scaled_zgrad = Mul (zgrad, scale)
            grad_B = Transpose <perm = [1, 0]> (scaled_zgrad)
        """,
        module=AdapterWeightGrad,
        key=key,
    )
    return forward, input_grad, weight_grad


class AdapterForward(nn.Module):
    """``z = x A^T`` (tokens, rank) and ``delta = scale * z B^T`` (tokens, out)."""

    def forward(self, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        # linear and mm, with the long side untransposed: to ExecuTorch's kernels a transpose is a copy.
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


def reference(graph: TrainingGraph, values: Inputs, dtype: torch.dtype = torch.float64) -> Arrays:
    """What a graph must compute, by autograd. ``values`` also has the adapter's weights where its inputs do not."""
    x, grad, lora_a, lora_b, scale = to_tensors(values, dtype, "x", "grad", "lora_A", "lora_B", "scale")
    if graph.kind == "adapter_forward":
        return to_floats(z=x @ lora_a.T, delta=_delta(x, lora_a, lora_b, scale))
    if graph.kind == "adapter_input_grad":
        x = torch.zeros(len(grad), lora_a.shape[1], dtype=dtype, requires_grad=True)
        z = x @ lora_a.T
        dz, grad_x = torch.autograd.grad(scale * (z @ lora_b.T), (z, x), grad)
        return to_floats(dz=dz, grad_x=grad_x)
    lora_a.requires_grad_()
    lora_b.requires_grad_()
    grad_a, grad_b = torch.autograd.grad(_delta(x, lora_a, lora_b, scale), (lora_a, lora_b), grad)
    return to_floats(grad_A=grad_a, grad_B=grad_b)


def _delta(x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> Tensor:
    return scale * (x @ lora_a.T @ lora_b.T)


def adapter_tests(graph: TrainingGraph, shape: tuple[int, int], rank: int, scaling: float) -> Iterator[GoldenCase]:
    """Random tokens through an adapter of (in, out) features; before that, another rank and number of tokens."""
    in_features, out_features = shape
    for tokens, some_rank in ((TOKENS - 2, rank + 3), (TOKENS, rank)):
        random = np.random.default_rng(0)
        values: Arrays = {
            "x": normal(random, tokens, in_features),
            "grad": normal(random, tokens, out_features),
            "lora_A": normal(random, some_rank, in_features) / np.float32(in_features**0.5),
            "lora_B": normal(random, out_features, some_rank),
            "scale": np.array(scaling, np.float32),
        }
        values["z"] = values["x"] @ values["lora_A"].T
        values["dz"] = values["scale"] * (values["grad"] @ values["lora_B"])
        exact, single = (reference(graph, values, dtype) for dtype in (torch.float64, torch.float32))
        yield GoldenCase({spec.name: values[spec.name] for spec in graph.inputs}, exact, allowed(exact, single))


def make(materials: Materials) -> Iterator[GraphWithCases]:
    """Three graphs of every shape."""
    for shape in materials.shapes:
        for graph in adapter_graphs(*shape):
            yield graph, adapter_tests(graph, shape, materials.rank, materials.scaling)
