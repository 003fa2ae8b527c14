"""The graphs of adapters whose A the server applies: what is trained is one matrix, behind what crosses the wire.

::

    forward        out  = scale * z C^T
    input_grad     dz   = scale * grad C
    weight_grad    grad_C = scale * grad^T z

with z and dz (tokens, rank), C (width, rank), out and grad (tokens, width). For the kind ``bottleneck`` C is the core R
of a group, as wide as it is high (LoRA-XS, Bałazy et al., arXiv 2405.17604), and the graphs have no key; for ``ffa`` it
is ``lora_B`` of a target module (FFA-LoRA, Sun et al., arXiv 2403.12313), and their key is its width.

``scale`` goes over what is as narrow as the rank, for the reason that ``lora.py`` gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from dlora.protocol.manifest import TensorSpec, core_key

from .arrays import Arrays, Inputs, normal, to_floats, to_tensors
from .golden_case import GoldenCase, GraphWithCases, Materials
from .graph import TrainingGraph
from .tolerances import allowed

KINDS: Final = ("core_forward", "core_input_grad", "core_weight_grad")
TOKENS: Final = 7


def core_graphs(width: int | None) -> tuple[TrainingGraph, ...]:
    """``core_forward``, ``core_input_grad`` and ``core_weight_grad`` of one width; None: as wide as the rank."""
    columns: int | str = "rank" if width is None else width
    key = core_key(width)
    z = TensorSpec("z", "fp32", ("tokens", "rank"))
    grad = TensorSpec("grad", "fp32", ("tokens", columns))
    core = TensorSpec("core", "fp32", (columns, "rank"))
    scale = TensorSpec("scale", "fp32", ())
    forward = TrainingGraph(
        "core_forward",
        inputs=(z, core, scale),
        outputs=(TensorSpec("out", "fp32", ("tokens", columns)),),
        body="""
            scaled_z = Mul (z, scale)
            out = Gemm <transB = 1> (scaled_z, core)
        """,
        module=CoreForward,
        key=key,
    )
    input_grad = TrainingGraph(
        "core_input_grad",
        inputs=(grad, core, scale),
        outputs=(TensorSpec("dz", "fp32", ("tokens", "rank")),),
        body="""
            grad_core = MatMul (grad, core)
            dz = Mul (grad_core, scale)
        """,
        module=CoreInputGrad,
        key=key,
    )
    weight_grad = TrainingGraph(
        "core_weight_grad",
        inputs=(z, grad, scale),
        outputs=(TensorSpec("grad_core", "fp32", (columns, "rank")),),
        body="""
            z_by_rank = Transpose <perm = [1, 0]> (z)
            zgrad = MatMul (z_by_rank, grad)
            scaled_zgrad = Mul (zgrad, scale)
            grad_core = Transpose <perm = [1, 0]> (scaled_zgrad)
        """,
        module=CoreWeightGrad,
        key=key,
    )
    return forward, input_grad, weight_grad


class CoreForward(nn.Module):
    """``out = scale * z C^T`` (tokens, width)."""

    def forward(self, z: Tensor, core: Tensor, scale: Tensor) -> Tensor:
        return nn.functional.linear(z * scale, core)


class CoreInputGrad(nn.Module):
    """``dz = scale * grad C`` (tokens, rank)."""

    def forward(self, grad: Tensor, core: Tensor, scale: Tensor) -> Tensor:
        return torch.mm(grad, core) * scale


class CoreWeightGrad(nn.Module):
    """``grad_C = scale * grad^T z`` (width, rank)."""

    def forward(self, z: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
        return torch.mm((z * scale).t(), grad).t()


def reference(graph: TrainingGraph, values: Inputs, dtype: torch.dtype = torch.float64) -> Arrays:
    """What a graph must compute, by autograd. ``values`` has every tensor, whichever the graph's inputs are."""
    z, grad, core, scale = to_tensors(values, dtype, "z", "grad", "core", "scale")
    z.requires_grad_()
    core.requires_grad_()
    out = scale * (z @ core.T)
    if graph.kind == "core_forward":
        return to_floats(out=out.detach())
    dz, grad_core = torch.autograd.grad(out, (z, core), grad)
    return to_floats(dz=dz) if graph.kind == "core_input_grad" else to_floats(grad_core=grad_core)


def core_tests(graph: TrainingGraph, width: int | None, rank: int, scaling: float) -> Iterator[GoldenCase]:
    """Random tokens through a core; before that, another rank and number of tokens."""
    for tokens, some_rank in ((TOKENS - 2, rank + 3), (TOKENS, rank)):
        random = np.random.default_rng(0)
        columns = some_rank if width is None else width
        values: Arrays = {
            "z": normal(random, tokens, some_rank),
            "grad": normal(random, tokens, columns),
            "core": normal(random, columns, some_rank),
            "scale": np.array(scaling, np.float32),
        }
        exact, single = (reference(graph, values, dtype) for dtype in (torch.float64, torch.float32))
        yield GoldenCase({spec.name: values[spec.name] for spec in graph.inputs}, exact, allowed(exact, single))


def make(materials: Materials) -> Iterator[GraphWithCases]:
    """Three graphs for cores, and three for every width of a target module's output."""
    for width in (None, *sorted({out_features for _, out_features in materials.shapes})):
        for graph in core_graphs(width):
            yield graph, core_tests(graph, width, materials.rank, materials.scaling)
