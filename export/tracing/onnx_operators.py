"""A traced graph as ONNX nodes: standard operators, opset 18, few enough to be checked by a device.

Products are in ``onnx_products.py``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from onnx import NodeProto, TensorProto
from torch import fx

from .aten import COPIES, aten
from .int4 import WIDEN
from .onnx_products import is_product_operand, product
from .onnx_writer import CannotEmitError, OnnxWriter

_DTYPES: Final = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int8: TensorProto.INT8,
    torch.bool: TensorProto.BOOL,
}
_PLAIN: Final[dict[Any, str]] = {
    aten.neg.default: "Neg",
    aten.sigmoid.default: "Sigmoid",
    aten.tanh.default: "Tanh",
    aten.exp.default: "Exp",
    aten.erf.default: "Erf",
    aten.relu.default: "Relu",
    aten.mul.Tensor: "Mul",
    aten.mul.Scalar: "Mul",
    aten.add.Tensor: "Add",
    aten.add.Scalar: "Add",
    aten.sub.Tensor: "Sub",
    aten.div.Tensor: "Div",
    aten.div.Scalar: "Div",
    aten.minimum.default: "Min",
    aten.le.Scalar: "LessOrEqual",
    aten.lt.Scalar: "Less",
    aten.gt.Scalar: "Greater",
    aten.gt.Tensor: "Greater",
    aten.eq.Tensor: "Equal",
    aten.bmm.default: "MatMul",
    aten.where.self: "Where",
}
"""Operators of the same operands in ONNX."""

_SIZES: Final = (aten.sym_size.int, aten.sym_numel.default, operator.mul, operator.floordiv, operator.add, operator.sub)


def to_nodes(graph: fx.GraphModule, output_names: Sequence[str]) -> list[NodeProto]:
    """The nodes of a graph, whose inputs are named as its placeholders. Raises ``CannotEmitError``."""
    writer = OnnxWriter(graph)
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            writer.values[node] = writer.constant(getattr(graph, node.target).detach().numpy())
        elif node.op == "call_function":
            _write(writer, node)
        elif node.op == "output":
            for name, each in zip(output_names, node.args[0], strict=True):
                writer.add("Identity", [writer.value(each)], [name])
    return writer.nodes


def _write(writer: OnnxWriter, node: fx.Node) -> None:
    target: Any = node.target
    if target in _SIZES or isinstance(node.meta.get("val"), (int, torch.SymInt)):
        return
    if target is aten.permute.default:
        return  # when something other than a product wants it
    if target in (aten._to_copy.default, WIDEN) and all(is_product_operand(user) for user in node.users):
        return  # likewise
    if target in _PLAIN:
        writer.values[node] = _plain(writer, node)
    elif target in _OPERATORS:
        writer.values[node] = _OPERATORS[target](writer, node)
    else:
        raise CannotEmitError(f"{target} has no ONNX here")


def _plain(writer: OnnxWriter, node: Any) -> str:
    first = next(each for each in node.args if isinstance(each, fx.Node))
    operands = [writer.value(operand, first) for operand in node.args]
    alpha = node.kwargs.get("alpha", 1)
    if alpha != 1:
        operands[1] = writer.add("Mul", [operands[1], writer.constant(alpha, np.float32)])
    return writer.add(_PLAIN[node.target], operands)


def _cast(writer: OnnxWriter, node: Any) -> str:
    return writer.add("Cast", [writer.value(node.args[0])], to=_DTYPES[node.meta["val"].dtype])


def _view(writer: OnnxWriter, node: Any) -> str:
    return writer.reshape(writer.value(node.args[0]), node.meta["val"].shape)


def _expand(writer: OnnxWriter, node: Any) -> str:
    return writer.add("Expand", [writer.value(node.args[0]), writer.shape(node.meta["val"].shape)])


def _log1p(writer: OnnxWriter, node: Any) -> str:
    return writer.add("Log", [writer.add("Add", [writer.value(node.args[0]), writer.constant(1, np.float32)])])


def _expm1(writer: OnnxWriter, node: Any) -> str:
    return writer.add("Sub", [writer.add("Exp", [writer.value(node.args[0])]), writer.constant(1, np.float32)])


def _rsqrt(writer: OnnxWriter, node: Any) -> str:
    return writer.add("Reciprocal", [writer.add("Sqrt", [writer.value(node.args[0])])])


def _power(writer: OnnxWriter, node: Any) -> str:
    value, exponent = writer.value(node.args[0]), node.args[1]
    if exponent not in (1, 2, 3):
        raise CannotEmitError(f"a power of {exponent}")
    return functools.reduce(lambda one, other: writer.add("Mul", [one, other]), [value] * int(exponent))


def _along(kind: str) -> Callable[[OnnxWriter, Any], str]:
    """An operator that is given an axis, or several."""

    def write(writer: OnnxWriter, node: Any) -> str:
        axes = node.args[1] if isinstance(node.args[1], Sequence) else [node.args[1]]
        return writer.add(kind, [writer.value(node.args[0]), writer.integers(*axes)])

    return write


def _item(writer: OnnxWriter, node: Any) -> str:
    found: str = writer.values[node.args[0]][node.args[1]]
    return found


def _layer_norm(writer: OnnxWriter, node: Any) -> tuple[str, str, str]:
    x, shape, weight, bias, epsilon = node.args
    axes, value = writer.integers(*range(-len(shape), 0)), writer.value(x)
    mean = writer.add("ReduceMean", [value, axes])
    centred = writer.add("Sub", [value, mean])
    variance = writer.add("ReduceMean", [writer.add("Mul", [centred, centred]), axes])
    spread = writer.add("Sqrt", [writer.add("Add", [variance, writer.constant(epsilon, np.float32)])])
    inverse = writer.add("Reciprocal", [spread])
    y = writer.add("Mul", [centred, inverse])
    y = y if weight is None else writer.add("Mul", [y, writer.value(weight)])
    y = y if bias is None else writer.add("Add", [y, writer.value(bias)])
    return y, mean, inverse


def _split(writer: OnnxWriter, node: Any) -> list[str]:
    axis: Any = node.args[2] if len(node.args) > 2 else 0
    parts, start = [], 0
    for part in node.meta["val"]:
        size = int(part.shape[axis])
        parts.append(_part(writer, writer.value(node.args[0]), start, start + size, axis))
        start += size
    return parts


def _part(writer: OnnxWriter, value: str, start: Any, end: Any, axis: int, step: int = 1) -> str:
    bounds = [writer.integers(each) if isinstance(each, int) else writer.size(each) for each in (start, end)]
    steps = [] if step == 1 else [writer.integers(step)]
    return writer.add("Slice", [value, *bounds, writer.integers(axis), *steps])


def _slice(writer: OnnxWriter, node: Any) -> str:
    axis, start, end, step = ([*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]])[:4]
    start, end = (_number(each) for each in (start, end))
    return _part(writer, writer.value(node.args[0]), start or 0, 1 << 62 if end is None else end, axis, step)


def _select(writer: OnnxWriter, node: Any) -> str:
    axis, index = node.args[1:3]
    axis %= len(node.args[0].meta["val"].shape)
    return writer.add("Gather", [writer.value(node.args[0]), writer.constant(index, np.int64)], axis=axis)


def _select_backward(writer: OnnxWriter, node: Any) -> str:
    shape = node.meta["val"].shape
    axis, index = (int(each) for each in node.args[2:4])
    axis, size = axis % len(shape), int(shape[axis])
    index %= size
    wide = writer.add("Unsqueeze", [writer.value(node.args[0]), writer.integers(axis)])
    return _pad(writer, wide, len(shape), axis, index, size - 1 - index)


def _slice_backward(writer: OnnxWriter, node: Any) -> str:
    shape = node.meta["val"].shape
    axis, start, end, step = node.args[2:6]
    axis %= len(shape)
    size: Any = shape[axis]
    if not isinstance(size, int):
        raise CannotEmitError("a gradient of a part of the tokens")
    start, end = (each + size if each < 0 else min(each, size) for each in (start, end))
    value = writer.value(node.args[0])
    if step == 1:
        return _pad(writer, value, len(shape), axis, start, size - end)
    if size % step or start >= step or end < size - step + 1 + start:
        raise CannotEmitError("a gradient of every so many values, which do not come out even")
    # Each value beside step - 1 zeros, as interleaved rotary embeddings want it.
    wide = writer.add("Unsqueeze", [value, writer.integers(axis + 1)])
    padded = _pad(writer, wide, len(shape) + 1, axis + 1, start, step - 1 - start)
    return writer.reshape(padded, shape)


def _pad(writer: OnnxWriter, value: str, dimensions: int, axis: int, before: int, after: int) -> str:
    pads = [0] * (2 * dimensions)
    pads[axis], pads[dimensions + axis] = before, after
    return writer.add("Pad", [value, writer.integers(*pads)])


def _full(writer: OnnxWriter, node: Any) -> str | None:
    if all(user.target is aten.index_put.default for user in node.users):
        return None
    dtype = {torch.bool: np.bool_, torch.int64: np.int64}.get(node.meta["val"].dtype, np.float32)
    return writer.add("Expand", [writer.constant(node.args[1], dtype), writer.shape(node.meta["val"].shape)])


def _concat(writer: OnnxWriter, node: Any) -> str:
    axis = node.args[1] if len(node.args) > 1 else 0
    return writer.add("Concat", [writer.value(part) for part in node.args[0]], axis=axis)


def _softmax(writer: OnnxWriter, node: Any) -> str:
    return writer.add("Softmax", [writer.value(node.args[0])], axis=node.args[1])


def _index(writer: OnnxWriter, node: Any) -> str:
    axes = _indexed(node.args[1])
    if len(axes) != 1:
        raise CannotEmitError("values chosen along several dimensions")
    return writer.add("Gather", [writer.value(node.args[0]), writer.value(node.args[1][axes[0]])], axis=axes[0])


def _indexed(indices: Sequence[fx.Node | None]) -> list[int]:
    return [axis for axis, each in enumerate(indices) if each is not None]


def _index_select(writer: OnnxWriter, node: Any) -> str:
    given, axis, places = node.args
    return writer.add("Gather", [writer.value(given), writer.value(places)], axis=axis % len(given.meta["val"].shape))


def _index_backward(writer: OnnxWriter, node: Any) -> str:
    """Values put where an index took them from, zeros elsewhere."""
    zeros, indices, values = node.args[:3]
    axes = _indexed(indices)
    chosen: Any = indices[axes[0]] if len(axes) == 1 else None
    if zeros.target is not aten.full.default or zeros.args[1] != 0 or chosen is None:
        raise CannotEmitError("values put into others")
    while chosen.target is aten._to_copy.default or chosen.target in COPIES:
        chosen = chosen.args[0]
    index = getattr(writer.graph, chosen.target, None) if chosen.op == "get_attr" else None
    shape, axis = node.meta["val"].shape, axes[0]
    if index is None or index.numel() != 1 or not isinstance(shape[axis], int):
        raise CannotEmitError("values put into others")
    place = int(index) % shape[axis]
    return _pad(writer, writer.value(values), len(shape), axis, place, shape[axis] - 1 - place)


def _repeat(writer: OnnxWriter, node: Any) -> str:
    given, times = node.args
    if len(times) != len(given.meta["val"].shape) or not all(isinstance(each, int) for each in times):
        raise CannotEmitError("values repeated in more dimensions than they have")
    value = writer.value(given)
    for axis, each in enumerate(times):
        if each > 1:
            value = writer.add("Concat", [value] * each, axis=axis)
    return value


def _reduced(kind: str) -> Callable[[OnnxWriter, Any], str]:
    def write(writer: OnnxWriter, node: Any) -> str:
        keep = len(node.args) > 2 and bool(node.args[2])
        return writer.add(kind, [writer.value(node.args[0]), writer.integers(*node.args[1])], keepdims=int(keep))

    return write


def _number(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, fx.Node) else value


_OPERATORS: Final[dict[Any, Callable[[OnnxWriter, Any], Any]]] = {
    aten.mm.default: product,
    aten._to_copy.default: _cast,
    aten.view.default: _view,
    aten.expand.default: _expand,
    aten.rsqrt.default: _rsqrt,
    aten.pow.Tensor_Scalar: _power,
    aten.sum.dim_IntList: _reduced("ReduceSum"),
    aten.mean.dim: _reduced("ReduceMean"),
    aten.unsqueeze.default: _along("Unsqueeze"),
    aten.squeeze.dims: _along("Squeeze"),
    operator.getitem: _item,
    aten.native_layer_norm.default: _layer_norm,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.slice.Tensor: _slice,
    aten.slice_backward.default: _slice_backward,
    aten.select.int: _select,
    aten.select_backward.default: _select_backward,
    aten.full.default: _full,
    aten.cat.default: _concat,
    aten._softmax.default: _softmax,
    aten.scalar_tensor.default: lambda writer, node: writer.value(node.args[0]),
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.index_put.default: _index_backward,
    aten.log1p.default: _log1p,
    aten.expm1.default: _expm1,
    aten.repeat.default: _repeat,
}
