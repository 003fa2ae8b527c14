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

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from dlora.protocol.manifest import TensorSpec, adapter_key

from .arrays import Arrays, normal, to_floats, to_tensors
from .golden_case import GoldenCase, GraphWithCases, Materials
from .graph import Computed, Specs, TrainingGraph

KINDS: Final = ("adapter_forward", "adapter_input_grad", "adapter_weight_grad")
TOKENS: Final = 7


def adapter_graphs(in_features: int, out_features: int) -> tuple[TrainingGraph, ...]:
    """``adapter_forward``, ``adapter_input_grad`` and ``adapter_weight_grad`` of one shape."""
    x, grad_x = (TensorSpec(name, "fp32", ("tokens", in_features)) for name in ("x", "grad_x"))
    grad, delta = (TensorSpec(name, "fp32", ("tokens", out_features)) for name in ("grad", "delta"))
    z, dz = (TensorSpec(name, "fp32", ("tokens", "rank")) for name in ("z", "dz"))
    lora_a, grad_a = (TensorSpec(name, "fp32", ("rank", in_features)) for name in ("lora_A", "grad_A"))
    lora_b, grad_b = (TensorSpec(name, "fp32", (out_features, "rank")) for name in ("lora_B", "grad_B"))
    scale = TensorSpec("scale", "fp32", ())

    def graph(
        kind: str, inputs: Specs, outputs: Specs, function: Callable[..., tuple[Tensor, Tensor]], body: str
    ) -> TrainingGraph:
        key = adapter_key(in_features, out_features)
        return TrainingGraph(kind, inputs, outputs, body, partial(Computed, function), key)

    return (
        graph(
            "adapter_forward",
            (x, lora_a, lora_b, scale),
            (z, delta),
            adapter_forward,
            """
            z_by_rank = Gemm <transB = 1> (lora_A, x)
            z = Transpose <perm = [1, 0]> (z_by_rank)
            scaled_z = Mul (z, scale)
            delta = Gemm <transB = 1> (scaled_z, lora_B)
        """,
        ),
        graph(
            "adapter_input_grad",
            (grad, lora_a, lora_b, scale),
            (dz, grad_x),
            adapter_input_grad,
            """
            gradB = MatMul (grad, lora_B)
            dz = Mul (gradB, scale)
            grad_x = MatMul (dz, lora_A)
        """,
        ),
        graph(
            "adapter_weight_grad",
            (x, z, grad, dz, scale),
            (grad_a, grad_b),
            adapter_weight_grad,
            """
            dz_by_rank = Transpose <perm = [1, 0]> (dz)
            grad_A = MatMul (dz_by_rank, x)
            z_by_rank = Transpose <perm = [1, 0]> (z)
            zgrad = MatMul (z_by_rank, grad)
            scaled_zgrad = Mul (zgrad, scale)
            grad_B = Transpose <perm = [1, 0]> (scaled_zgrad)
        """,
        ),
    )


def adapter_forward(x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``z = x A^T`` (tokens, rank) and ``delta = scale * z B^T`` (tokens, out)."""
    # linear and mm, with the long side untransposed: to ExecuTorch's kernels a transpose is a copy.
    z = nn.functional.linear(x, lora_a)
    return z, nn.functional.linear(z * scale, lora_b)


def adapter_input_grad(grad: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``dz = scale * grad B`` (tokens, rank) and ``grad_x = dz A`` (tokens, in)."""
    dz = torch.mm(grad, lora_b) * scale
    return dz, torch.mm(dz, lora_a)


def adapter_weight_grad(x: Tensor, z: Tensor, grad: Tensor, dz: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``grad_A = dz^T x`` (rank, in) and ``grad_B = scale * grad^T z`` (out, rank)."""
    # (z^T grad)^T and not grad^T z: it transposes what has rank columns, not what has out.
    return torch.mm(dz.t(), x), torch.mm((z * scale).t(), grad).t()


def reference(values: Arrays, dtype: torch.dtype) -> Arrays:
    """What the graphs must compute, all of their outputs, by autograd."""
    x, grad, lora_a, lora_b, scale = to_tensors(values, dtype, "x", "grad", "lora_A", "lora_B", "scale")
    for leaf in (x, lora_a, lora_b):
        leaf.requires_grad_()
    z = x @ lora_a.T
    delta = scale * (z @ lora_b.T)
    dz, grad_x, grad_a, grad_b = torch.autograd.grad(delta, (z, x, lora_a, lora_b), grad)
    return to_floats(z=z, delta=delta, dz=dz, grad_x=grad_x, grad_A=grad_a, grad_B=grad_b)


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
        yield GoldenCase.of(graph, values, reference)


def make(materials: Materials) -> Iterator[GraphWithCases]:
    """Three graphs of every shape."""
    for shape in materials.shapes:
        for graph in adapter_graphs(*shape):
            yield graph, adapter_tests(graph, shape, materials.rank, materials.scaling)
