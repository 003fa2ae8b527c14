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

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from dlora.protocol.manifest import TensorSpec, core_key

from .arrays import Arrays, normal, to_floats, to_tensors
from .golden_case import GoldenCase, GraphWithCases, Materials
from .graph import Computed, Specs, TrainingGraph

KINDS: Final = ("core_forward", "core_input_grad", "core_weight_grad")
TOKENS: Final = 7


def core_graphs(width: int | None) -> tuple[TrainingGraph, ...]:
    """``core_forward``, ``core_input_grad`` and ``core_weight_grad`` of one width; None: as wide as the rank."""
    columns: int | str = "rank" if width is None else width
    z, dz = (TensorSpec(name, "fp32", ("tokens", "rank")) for name in ("z", "dz"))
    grad, out = (TensorSpec(name, "fp32", ("tokens", columns)) for name in ("grad", "out"))
    core, grad_core = (TensorSpec(name, "fp32", (columns, "rank")) for name in ("core", "grad_core"))
    scale = TensorSpec("scale", "fp32", ())

    def graph(
        kind: str, inputs: Specs, output: TensorSpec, function: Callable[..., Tensor], body: str
    ) -> TrainingGraph:
        return TrainingGraph(kind, inputs, (output,), body, partial(Computed, function), core_key(width))

    return (
        graph(
            "core_forward",
            (z, core, scale),
            out,
            core_forward,
            """
            scaled_z = Mul (z, scale)
            out = Gemm <transB = 1> (scaled_z, core)
        """,
        ),
        graph(
            "core_input_grad",
            (grad, core, scale),
            dz,
            core_input_grad,
            """
            grad_core = MatMul (grad, core)
            dz = Mul (grad_core, scale)
        """,
        ),
        graph(
            "core_weight_grad",
            (z, grad, scale),
            grad_core,
            core_weight_grad,
            """
            z_by_rank = Transpose <perm = [1, 0]> (z)
            zgrad = MatMul (z_by_rank, grad)
            scaled_zgrad = Mul (zgrad, scale)
            grad_core = Transpose <perm = [1, 0]> (scaled_zgrad)
        """,
        ),
    )


def core_forward(z: Tensor, core: Tensor, scale: Tensor) -> Tensor:
    """``out = scale * z C^T`` (tokens, width)."""
    return nn.functional.linear(z * scale, core)


def core_input_grad(grad: Tensor, core: Tensor, scale: Tensor) -> Tensor:
    """``dz = scale * grad C`` (tokens, rank)."""
    return torch.mm(grad, core) * scale


def core_weight_grad(z: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
    """``grad_C = scale * grad^T z`` (width, rank)."""
    return torch.mm((z * scale).t(), grad).t()


def reference(values: Arrays, dtype: torch.dtype) -> Arrays:
    """What the graphs must compute, all of their outputs, by autograd."""
    z, grad, core, scale = to_tensors(values, dtype, "z", "grad", "core", "scale")
    z.requires_grad_()
    core.requires_grad_()
    out = scale * (z @ core.T)
    dz, grad_core = torch.autograd.grad(out, (z, core), grad)
    return to_floats(out=out, dz=dz, grad_core=grad_core)


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
        yield GoldenCase.of(graph, values, reference)


def make(materials: Materials) -> Iterator[GraphWithCases]:
    """Three graphs for cores, and three for every width of a target module's output."""
    for width in (None, *sorted({out_features for _, out_features in materials.shapes})):
        for graph in core_graphs(width):
            yield graph, core_tests(graph, width, materials.rank, materials.scaling)
