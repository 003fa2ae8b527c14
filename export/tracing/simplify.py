"""Traced graphs without what computes nothing, and cut where a device keeps values from forward to backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx
from torch._functorch.compile_utils import fx_graph_cse

from .aten import COPIES, aten
from .int4 import WIDEN

_SAME_WHERE_OF_ONE_SHAPE: tuple[Any, ...] = (
    aten.view.default, aten.expand.default, aten.slice.Tensor, aten.slice_backward.default
)  # fmt: skip


def simplify(traced: fx.GraphModule) -> fx.GraphModule:
    """Drop copies and views that change nothing, join transposes, and compute the same once."""
    graph = traced.graph
    for _ in range(2):  # one view may hide another
        for node in list(graph.nodes):
            _replace(node)
        graph.eliminate_dead_code()
    made = fx.GraphModule(traced, fx_graph_cse(graph))
    made.meta["outputs"] = traced.meta["outputs"]
    inputs = (each.find_nodes(op="placeholder") for each in (graph, made.graph))
    for node, copy in zip(*inputs, strict=True):
        copy.meta |= {key: node.meta[key] for key in ("name", "sizes")}
    return made


def _replace(node: fx.Node) -> None:
    if node.op != "call_function":
        return
    given: Any = node.args[0] if node.args else None
    is_cast_to_itself = node.target is aten._to_copy.default and node.meta["val"].dtype == given.meta["val"].dtype
    if node.target in COPIES or is_cast_to_itself:
        node.replace_all_uses_with(given)
    elif node.target is aten.copy.default and _same_shape(node, node.args[1]):
        node.replace_all_uses_with(node.args[1])  # type: ignore[arg-type]
    elif node.target in _SAME_WHERE_OF_ONE_SHAPE and _same_shape(node, given):
        node.replace_all_uses_with(given)
    elif node.target is aten.view.default and given.target is aten.view.default:
        node.args = (given.args[0], node.args[1])
    elif node.target is aten.permute.default and given.target is aten.permute.default:
        inner, outer = given.args[1], node.args[1]
        order = [inner[axis] for axis in outer]  # type: ignore[union-attr]
        if order == sorted(order):
            node.replace_all_uses_with(given.args[0])
        else:
            node.args = (given.args[0], order)


def _same_shape(one: fx.Node, other: Any) -> bool:
    shapes = one.meta["val"].shape, other.meta["val"].shape
    return len(shapes[0]) == len(shapes[1]) and all(str(a) == str(b) for a, b in zip(*shapes, strict=True))


def outputs_of(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """What a graph gives, by name."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    return dict(zip(graph.meta["outputs"], output.args[0], strict=True))


def cut(graph: fx.GraphModule, outputs: Mapping[str, fx.Node], given: Mapping[fx.Node, str]) -> fx.GraphModule:
    """The part of ``graph`` that computes ``outputs``, where the nodes of ``given`` are inputs of those names."""
    needed = ancestors(outputs.values(), stop=given)
    made, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = [node for node in graph.graph.nodes if node in needed and (node.op == "placeholder" or node in given)]
    for index, node in enumerate(inputs):
        copies[node] = made.placeholder(f"input_{index}")
        copies[node].meta = {
            "val": node.meta["val"],
            "name": given.get(node) or node.meta["name"],
            "sizes": node.meta.get("sizes", {}),
        }
    for node in graph.graph.nodes:
        if node in needed and node not in copies and node.op != "output":
            copies[node] = made.node_copy(node, lambda each: copies[each])
    made.output([copies[node] for node in outputs.values()])
    part = fx.GraphModule(graph, made)
    part.meta["outputs"] = list(outputs)
    return part


def ancestors(roots: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """The nodes that others depend on, and these; not looking beyond those of ``stop``."""
    seen, ends, todo = set[fx.Node](), set(stop), list(roots)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in ends:
            todo += node.all_input_nodes
    return seen


def products_of(graph: fx.GraphModule, names: Iterable[str]) -> dict[fx.Node, str]:
    """The products in the forward pass with the inputs of these names (a weight, or lora_A), and whose they are."""
    forward = ancestors([outputs_of(graph)["y"]])
    wanted = set(names)
    found: dict[fx.Node, str] = {}
    for node in graph.graph.nodes:
        if node in forward and node.target is aten.mm.default:
            for name in map(_name_of, node.args[:2]):
                if name in wanted:
                    found[node] = name
    return found


def _name_of(operand: Any) -> str:
    """The input that an operand is, transposed or widened perhaps; empty where it is none."""
    while operand.target in (aten.permute.default, aten._to_copy.default, WIDEN):
        operand = operand.args[0]
    return str(operand.meta["name"]) if operand.op == "placeholder" else ""
