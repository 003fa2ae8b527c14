"""Which blocks share a traced graph: tracing takes seconds a block, and most models have one or two shapes of block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, fx

from .calls import BlockCall
from .to_module import TracedModule
from .trace import passes_of_block

_ROUNDING: Final = 1e-4  # of float32: the same sums in another order


def gives_the_same(
    traced: fx.GraphModule, call: BlockCall, weights: Mapping[str, Tensor], targets: Sequence[str]
) -> bool:
    """Whether the graph of another block, of ``trace_block``, gives this block's output and gradients: both are run.

    What two blocks may differ in beside their inputs, as where the scores of attention have another scale in each,
    changes some gradient by far more than rounding does.
    """
    named, passes = passes_of_block(call, weights, targets)
    known = {node.meta["name"]: node.meta["val"] for node in traced.graph.find_nodes(op="placeholder")}
    if _kinds(named) != _kinds(known):
        return False
    expected = passes(*named.values())
    with torch.no_grad():
        found = TracedModule(traced)(*named.values())
    return all(
        one.shape == other.shape and bool((one - other).abs().max() <= _ROUNDING * other.abs().max())
        for one, other in zip(found, expected, strict=True)
    )


def _kinds(named: Mapping[str, Tensor]) -> list[tuple[str, torch.dtype, int]]:
    return [(name, tensor.dtype, tensor.ndim) for name, tensor in named.items()]
