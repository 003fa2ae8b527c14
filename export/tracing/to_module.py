"""A traced graph as a torch module, in the form that ExecuTorch's kernels are good at."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from .aten import aten, is_transposed
from .int4 import WIDEN, widened


class TracedModule(nn.Module):
    """A traced graph: its inputs in the order of its placeholders, a tuple of its outputs."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        nodes, values = fx.Graph(), dict[fx.Node, Any]()
        for node in graph.graph.nodes:
            values[node] = nodes.node_copy(node, lambda each: values[each])
        for node in list(nodes.nodes):
            if node.target is aten.view.default:
                node.target = aten.reshape.default
            elif node.target is WIDEN:
                node.target = widened
            elif node.target is aten.mm.default and is_transposed(node.args[1]) and not is_transposed(node.args[0]):
                # linear reads a weight as it lies; to mm a transpose is a copy.
                with nodes.inserting_before(node):
                    product = nodes.call_function(aten.linear.default, (node.args[0], node.args[1].args[0]))
                product.meta = dict(node.meta)
                node.replace_all_uses_with(product)
                nodes.erase_node(node)
        nodes.eliminate_dead_code()
        self.graph_module = fx.GraphModule(graph, nodes)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the graph gives."""
        return tuple(self.graph_module(*tensors))
