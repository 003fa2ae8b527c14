"""A traced graph as ONNX nodes: standard operators, opset 18, few enough to be checked by a device."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from torch import fx

from .onnx_operators import write_operator
from .onnx_writer import CannotEmitError, OnnxWriter

__all__ = ["CannotEmitError", "to_nodes"]


def to_nodes(graph: fx.GraphModule, output_names: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes of a graph, whose inputs are named as its placeholders. Raises ``CannotEmitError``."""
    writer = OnnxWriter(graph)
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            writer.values[node] = writer.constant(getattr(graph, node.target).detach().numpy())
        elif node.op == "call_function":
            write_operator(writer, node)
        elif node.op == "output":
            for name, each in zip(output_names, node.args[0], strict=True):
                writer.add("Identity", [writer.value(each)], [name])
    return writer.nodes
