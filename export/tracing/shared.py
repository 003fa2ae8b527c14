"""Which blocks share a traced graph: tracing takes seconds a block, and most models have one or two shapes of block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from .calls import BlockCall, near
from .to_module import TracedModule
from .trace import passes_of_block


def gives_the_same(
    traced: fx.GraphModule, call: BlockCall, weights: Mapping[str, Tensor], targets: Sequence[str]
) -> bool:
    """Whether the graph of another block, of ``trace_block``, gives this block's output and gradients: both are run.

    What two blocks may differ in beside their inputs, as where the scores of attention have another scale in each,
    changes some gradient by far more than rounding does.
    """
    named, passes = passes_of_block(call, weights, targets)
    inputs = traced.graph.find_nodes(op="placeholder")
    if len(inputs) != len(named) or not all(_takes(*each) for each in zip(inputs, named.items(), strict=True)):
        return False
    expected = passes(*named.values())
    with torch.no_grad():
        found = TracedModule(traced)(*named.values())
    return all(
        one.shape == other.shape and near(one, other) for one, other in zip(found, expected, strict=True)
    )


def _takes(node: fx.Node, given: tuple[str, Tensor]) -> bool:
    """Whether an input of a graph has this name, this dtype, and this shape but for its sizes that are open."""
    name, tensor = given
    known, open_sizes = node.meta["val"], node.meta["sizes"]
    if (node.meta["name"], known.dtype, known.ndim) != (name, tensor.dtype, tensor.ndim):
        return False
    return all(axis in open_sizes or known.shape[axis] == size for axis, size in enumerate(tensor.shape))
