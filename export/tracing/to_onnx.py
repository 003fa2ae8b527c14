"""A traced graph as ONNX nodes: standard operators, opset 18, small enough to be checked by a device.

What a device minds most is memory, so two things are done here that a general exporter does not. A stored weight that
is large is widened slab by slab, in a Scan over its rows: whole, it would take two or four times what is stored, and
runtimes widen several at once. And transposes go into the products.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx

from .trace import aten

SLAB_VALUES: Final = 1 << 20  # of a weight that is widened: 4 MB
_DTYPES: Final = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int8: TensorProto.INT8,
    torch.bool: TensorProto.BOOL,
}
_UNARY: Final[dict[Any, str]] = {
    aten.neg.default: "Neg",
    aten.sigmoid.default: "Sigmoid",
    aten.tanh.default: "Tanh",
    aten.exp.default: "Exp",
    aten.erf.default: "Erf",
    aten.relu.default: "Relu",
}
_BINARY: Final[dict[Any, str]] = {
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
}
_SIZES: Final = (aten.sym_size.int, aten.sym_numel.default, operator.mul, operator.floordiv, operator.add, operator.sub)


_COPIES: Final = (aten.lift_fresh_copy.default, aten.clone.default, aten.alias.default)


_Node = Any  # fx.Node, whose arguments have a type of a dozen alternatives


class CannotEmitError(Exception):
    """An operator, or a form of one, that has no ONNX here."""


def to_nodes(graph: fx.GraphModule, output_names: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes of a graph, whose inputs are named as its placeholders. Raises ``CannotEmitError``."""
    return _Emitter(graph).nodes_for(output_names)


class _Emitter:
    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._values: dict[_Node, Any] = {}
        self._sizes: dict[str, str] = {}  # symbol to the value that holds it
        self._count = 0

    def nodes_for(self, output_names: Sequence[str]) -> list[onnx.NodeProto]:
        placeholders = [node for node in self._graph.graph.nodes if node.op == "placeholder"]
        for node in placeholders:
            self._values[node] = node.meta["name"]
        self._open = {  # where a symbol can be read off
            str(size): (node.meta["name"], axis)
            for node in placeholders
            for axis, size in enumerate(node.meta["val"].shape)
            if not isinstance(size, int)
        }
        (output,) = (node for node in self._graph.graph.nodes if node.op == "output")
        for node in self._graph.graph.nodes:
            if node.op == "get_attr":
                self._values[node] = self.constant(getattr(self._graph, node.target).detach().numpy())
            elif node.op == "call_function":
                self._emit(node)
        for name, node in zip(output_names, output.args[0], strict=True):
            self.add("Identity", [self.value(node)], [name])
        return self._nodes

    def add(self, kind: str, inputs: Sequence[str], outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Append a node; returns the name of its first output."""
        if not outputs:
            self._count += 1
            outputs = [f"v{self._count}"]
        self._nodes.append(helper.make_node(kind, list(inputs), list(outputs), **attributes))
        return outputs[0]

    def constant(self, value: Any, dtype: Any = None) -> str:
        array = np.asarray(value, dtype)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = f"c{len(self._constants)}"
            tensor = numpy_helper.from_array(array)
            self._nodes.append(helper.make_node("Constant", [], [self._constants[key]], value=tensor))
        return self._constants[key]

    def integers(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def value(self, operand: Any, like: _Node | None = None) -> str:
        """The value of an operand, which may be a number."""
        if isinstance(operand, fx.Node):
            if operand not in self._values and operand.target is aten.permute.default:
                self._values[operand] = self._transpose(operand)
            found: str = self._values[operand]
            return found
        is_integer = like is not None and like.meta["val"].dtype == torch.int64
        return self.constant(operand, np.int64 if is_integer else np.float32)

    def shape(self, shape: Sequence[Any]) -> str:
        """A shape as int64, sizes that are open read off the inputs."""
        if all(isinstance(size, int) for size in shape):
            return self.integers(*shape)
        parts = [self.integers(size) if isinstance(size, int) else self._size(size) for size in shape]
        return self.add("Concat", parts, axis=0) if len(parts) > 1 else parts[0]

    def _size(self, size: Any) -> str:
        """The value, int64 (1,), of a size that is open, or is computed of such."""
        expression = size.node.expr if isinstance(size, torch.SymInt) else size
        key = str(expression)
        if key not in self._sizes:
            if key in self._open:
                name, axis = self._open[key]
                self._sizes[key] = self.add("Shape", [name], start=axis, end=axis + 1)
            elif expression.is_Integer:
                self._sizes[key] = self.integers(int(expression))
            elif expression.is_Add or expression.is_Mul:
                parts = [self._size(part) for part in expression.args]
                kind = "Add" if expression.is_Add else "Mul"
                self._sizes[key] = functools.reduce(lambda one, other: self.add(kind, [one, other]), parts)
            else:
                raise CannotEmitError(f"a size {key} that is none of an input's")
        return self._sizes[key]

    def _reshape(self, value: str, shape: Sequence[Any]) -> str:
        if sum(not isinstance(size, int) for size in shape) <= 1:
            return self.add(
                "Reshape", [value, self.integers(*(size if isinstance(size, int) else -1 for size in shape))]
            )
        return self.add("Reshape", [value, self.shape(shape)])

    def _transpose(self, node: _Node) -> str:
        return self.add("Transpose", [self.value(node.args[0])], perm=list(node.args[1]))

    def _emit(self, node: _Node) -> None:
        target: Any = node.target
        if target in _SIZES or isinstance(node.meta.get("val"), (int, torch.SymInt)):
            return
        if target is aten.permute.default:
            return  # when something other than a product wants it
        if target is aten._to_copy.default and all(_is_product_operand(user) for user in node.users):
            return  # likewise
        emit = _EMITTERS.get(target)
        if emit is not None:
            self._values[node] = emit(self, node)
        elif target in _UNARY:
            self._values[node] = self.add(_UNARY[target], [self.value(node.args[0])])
        elif target in _BINARY:
            self._values[node] = self._binary(node)
        else:
            raise CannotEmitError(f"{target} has no ONNX here")

    def _binary(self, node: _Node) -> str:
        first: Any = next((each for each in node.args if isinstance(each, fx.Node)), None)
        one, other = (self.value(operand, first) for operand in node.args[:2])
        alpha: Any = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if alpha != 1:
            other = self.add("Mul", [other, self.constant(alpha, np.float32)])
        return self.add(_BINARY[node.target], [one, other])

    # Products.

    def product(self, node: _Node) -> str:
        left, left_transposed = _untransposed(node.args[0])
        right, right_transposed = _untransposed(node.args[1])
        if right.target is aten._to_copy.default:
            return self._product_with_stored(left, left_transposed, right, right_transposed)
        if left_transposed:
            # Written out: kernels are bad at products along the long side.
            operands = [self.add("Transpose", [self.value(left)], perm=[1, 0]), self.value(right)]
            if not right_transposed:
                return self.add("MatMul", operands)
            return self.add("Gemm", operands, transB=1)
        if right_transposed:
            return self.add("Gemm", [self.value(left), self.value(right)], transB=1)
        return self.add("MatMul", [self.value(left), self.value(right)])

    def _product_with_stored(self, left: _Node, left_transposed: bool, cast: _Node, is_forward: bool) -> str:
        """x W^T, or grad W, with a weight (out, in) that is widened here."""
        weight: Any = cast.args[0]
        if left_transposed or weight.op != "placeholder":
            raise CannotEmitError("a stored weight in a product of another form")
        rows, columns = weight.meta["val"].shape
        slabs = _slabs(rows, columns)
        name, x = weight.meta["name"], self.value(left)
        if slabs == 1:
            wide = self.add("Cast", [name], to=TensorProto.FLOAT)
            return self.add("Gemm", [x, wide], transB=1) if is_forward else self.add("MatMul", [x, wide])
        return self._scan(name, x, slabs, rows // slabs, columns, is_forward=is_forward)

    def _scan(self, weight: str, x: str, slabs: int, slab: int, columns: int, *, is_forward: bool) -> str:
        self._count += 1
        p = f"s{self._count}_"
        starts = self.constant(np.arange(slabs, dtype=np.int64)[:, None] * slab)
        step, axis_0 = self.integers(slab), self.integers(0)
        start = helper.make_tensor_value_info(f"{p}start", TensorProto.INT64, [1])
        body = [
            helper.make_node("Add", [f"{p}start", step], [f"{p}end"]),
            helper.make_node("Slice", [weight, f"{p}start", f"{p}end", axis_0], [f"{p}stored"]),
            helper.make_node("Cast", [f"{p}stored"], [f"{p}wide"], to=TensorProto.FLOAT),
        ]
        if is_forward:
            body.append(helper.make_node("Gemm", [f"{p}wide", x], [f"{p}y"], transB=1))  # (slab, tokens)
            found = helper.make_tensor_value_info(f"{p}y", TensorProto.FLOAT, [slab, None])
            stacked = self.add(
                "Scan", [starts], body=helper.make_graph(body, f"{p}body", [start], [found]), num_scan_inputs=1
            )
            return self.add("Transpose", [self.add("Reshape", [stacked, self.integers(slabs * slab, -1)])], perm=[1, 0])
        by_output = self.add("Transpose", [x], perm=[1, 0])
        rows = self.add("Concat", [self.add("Shape", [x], start=0, end=1), self.integers(columns)], axis=0)
        zeros = self.add("Expand", [self.constant(0, np.float32), rows])
        body += [
            helper.make_node("Slice", [by_output, f"{p}start", f"{p}end", axis_0], [f"{p}x"]),
            helper.make_node("Gemm", [f"{p}x", f"{p}wide", f"{p}sum"], [f"{p}next"], transA=1),
        ]
        before = helper.make_tensor_value_info(f"{p}sum", TensorProto.FLOAT, [None, columns])
        after = helper.make_tensor_value_info(f"{p}next", TensorProto.FLOAT, [None, columns])
        graph = helper.make_graph(body, f"{p}body", [before, start], [after])
        return self.add("Scan", [zeros, starts], body=graph, num_scan_inputs=1)

    # The rest, by operator.

    def cast(self, node: _Node) -> str:
        return self.add("Cast", [self.value(node.args[0])], to=_DTYPES[node.meta["val"].dtype])

    def view(self, node: _Node) -> str:
        return self._reshape(self.value(node.args[0]), node.meta["val"].shape)

    def expand(self, node: _Node) -> str:
        return self.add("Expand", [self.value(node.args[0]), self.shape(node.meta["val"].shape)])

    def matmul(self, node: _Node) -> str:
        return self.add("MatMul", [self.value(node.args[0]), self.value(node.args[1])])

    def rsqrt(self, node: _Node) -> str:
        return self.add("Reciprocal", [self.add("Sqrt", [self.value(node.args[0])])])

    def power(self, node: _Node) -> str:
        value, exponent = self.value(node.args[0]), node.args[1]
        if exponent not in (1, 2, 3):
            raise CannotEmitError(f"a power of {exponent}")
        return functools.reduce(lambda one, other: self.add("Mul", [one, other]), [value] * int(exponent))

    def reduce(self, kind: str) -> Callable[[_Node], str]:
        def emit(node: _Node) -> str:
            axes: Any = node.args[1]
            keep = len(node.args) > 2 and bool(node.args[2])
            return self.add(kind, [self.value(node.args[0]), self.integers(*axes)], keepdims=int(keep))

        return emit

    def unsqueeze(self, node: _Node) -> str:
        axis: Any = node.args[1]
        return self.add("Unsqueeze", [self.value(node.args[0]), self.integers(axis)])

    def squeeze(self, node: _Node) -> str:
        axes: Any = node.args[1]
        return self.add("Squeeze", [self.value(node.args[0]), self.integers(*axes)])

    def item(self, node: _Node) -> str:
        values: Any = self._values[node.args[0]]
        found: str = values[node.args[1]]
        return found

    def layer_norm(self, node: _Node) -> tuple[str, str, str]:
        x, shape, weight, bias, epsilon = node.args
        axes, value = self.integers(*range(-len(shape), 0)), self.value(x)
        mean = self.add("ReduceMean", [value, axes])
        centred = self.add("Sub", [value, mean])
        variance = self.add("ReduceMean", [self.add("Mul", [centred, centred]), axes])
        spread = self.add("Sqrt", [self.add("Add", [variance, self.constant(epsilon, np.float32)])])
        inverse = self.add("Reciprocal", [spread])
        y = self.add("Mul", [centred, inverse])
        y = y if weight is None else self.add("Mul", [y, self.value(weight)])
        y = y if bias is None else self.add("Add", [y, self.value(bias)])
        return y, mean, inverse

    def split(self, node: _Node) -> list[str]:
        axis: Any = node.args[2] if len(node.args) > 2 else 0
        parts, start = [], 0
        for part in node.meta["val"]:
            size = int(part.shape[axis])
            parts.append(self._slice(self.value(node.args[0]), start, start + size, axis))
            start += size
        return parts

    def _slice(self, value: str, start: Any, end: Any, axis: int, step: int = 1) -> str:
        bounds = [self.integers(each) if isinstance(each, int) else self._size(each) for each in (start, end)]
        return self.add(
            "Slice", [value, *bounds, self.integers(axis), *([self.integers(step)] if step != 1 else [])]
        )

    def slice(self, node: _Node) -> str:
        axis, start, end, step = ([*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]])[:4]
        start, end = (_number(each) for each in (start, end))
        return self._slice(self.value(node.args[0]), start or 0, 1 << 62 if end is None else end, axis, step)

    def select(self, node: _Node) -> str:
        axis, index = node.args[1:3]
        axis %= len(node.args[0].meta["val"].shape)
        return self.add("Gather", [self.value(node.args[0]), self.constant(index, np.int64)], axis=axis)

    def select_backward(self, node: _Node) -> str:
        shape = node.meta["val"].shape
        axis, index = (int(each) for each in node.args[2:4])
        axis, size = axis % len(shape), int(shape[axis])
        index %= size
        wide = self.add("Unsqueeze", [self.value(node.args[0]), self.integers(axis)])
        return self._pad(wide, len(shape), axis, index, size - 1 - index)

    def slice_backward(self, node: _Node) -> str:
        shape = node.meta["val"].shape
        axis, start, end, step = node.args[2:6]
        axis %= len(shape)
        size: Any = shape[axis]
        if not isinstance(size, int):
            raise CannotEmitError("a gradient of a part of the tokens")
        start, end = (each + size if each < 0 else min(each, size) for each in (start, end))
        value = self.value(node.args[0])
        if step == 1:
            return self._pad(value, len(shape), axis, start, size - end)
        if size % step or start >= step or end < size - step + 1 + start:
            raise CannotEmitError("a gradient of every so many values, which do not come out even")
        # Each value beside step - 1 zeros, as interleaved rotary embeddings want it.
        wide = self.add("Unsqueeze", [value, self.integers(axis + 1)])
        padded = self._pad(wide, len(shape) + 1, axis + 1, start, step - 1 - start)
        return self._reshape(padded, shape)

    def _pad(self, value: str, dimensions: int, axis: int, before: int, after: int) -> str:
        pads = [0] * (2 * dimensions)
        pads[axis], pads[dimensions + axis] = before, after
        return self.add("Pad", [value, self.integers(*pads)])

    def full(self, node: _Node) -> str | None:
        if all(user.target is aten.index_put.default for user in node.users):
            return None
        dtype = {torch.bool: np.bool_, torch.int64: np.int64}.get(node.meta["val"].dtype, np.float32)
        return self.add("Expand", [self.constant(node.args[1], dtype), self.shape(node.meta["val"].shape)])

    def concat(self, node: _Node) -> str:
        axis: Any = node.args[1] if len(node.args) > 1 else 0
        parts: Any = node.args[0]
        return self.add("Concat", [self.value(part) for part in parts], axis=axis)

    def softmax(self, node: _Node) -> str:
        axis: Any = node.args[1]
        return self.add("Softmax", [self.value(node.args[0])], axis=axis)

    def where(self, node: _Node) -> str:
        return self.add("Where", [self.value(each) for each in node.args[:3]])

    def scalar(self, node: _Node) -> str:
        return self.value(node.args[0])

    def index(self, node: _Node) -> str:
        indices: Any = node.args[1]
        axes = [axis for axis, each in enumerate(indices) if each is not None]
        if len(axes) != 1:
            raise CannotEmitError("values chosen along several dimensions")
        return self.add("Gather", [self.value(node.args[0]), self.value(indices[axes[0]])], axis=axes[0])

    def index_backward(self, node: _Node) -> str:
        """Values put where an index took them from, zeros elsewhere."""
        zeros, indices, values = node.args[:3]
        axes = [axis for axis, each in enumerate(indices) if each is not None]
        chosen: Any = indices[axes[0]] if len(axes) == 1 else None
        if zeros.target is not aten.full.default or zeros.args[1] != 0 or chosen is None:
            raise CannotEmitError("values put into others")
        while chosen.target is aten._to_copy.default or chosen.target in _COPIES:
            chosen = chosen.args[0]
        index = getattr(self._graph, chosen.target, None) if chosen.op == "get_attr" else None
        shape, axis = node.meta["val"].shape, axes[0]
        if index is None or index.numel() != 1 or not isinstance(shape[axis], int):
            raise CannotEmitError("values put into others")
        place = int(index) % shape[axis]
        return self._pad(self.value(values), len(shape), axis, place, shape[axis] - 1 - place)

    def expm1(self, node: _Node) -> str:
        return self.add("Sub", [self.add("Exp", [self.value(node.args[0])]), self.constant(1, np.float32)])

    def repeat(self, node: _Node) -> str:
        times: Any = node.args[1]
        given: Any = node.args[0]
        if len(times) != len(given.meta["val"].shape) or not all(isinstance(each, int) for each in times):
            raise CannotEmitError("values repeated in more dimensions than they have")
        value = self.value(given)
        for axis, each in enumerate(times):
            if each > 1:
                value = self.add("Concat", [value] * each, axis=axis)
        return value

    def log1p(self, node: _Node) -> str:
        return self.add("Log", [self.add("Add", [self.value(node.args[0]), self.constant(1, np.float32)])])


def _number(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, fx.Node) else value


def _untransposed(operand: Any) -> tuple[_Node, bool]:
    """An operand of a product without its transpose, and whether there was one."""
    if operand.target is aten.permute.default and list(operand.args[1]) == [1, 0]:
        return operand.args[0], True
    return operand, False


def _is_product_operand(node: _Node) -> bool:
    if node.target is aten.mm.default:
        return True
    return node.target is aten.permute.default and all(user.target is aten.mm.default for user in node.users)


def _slabs(rows: int, columns: int) -> int:
    """In how many equal parts the rows of a weight are widened."""
    slabs = 1
    while rows * columns // slabs > SLAB_VALUES and rows % (2 * slabs) == 0:
        slabs *= 2
    return slabs


def _of_kind(kind: str) -> Callable[[_Emitter, _Node], str]:
    return lambda emitter, node: emitter.reduce(kind)(node)


_EMITTERS: Final[dict[Any, Callable[[_Emitter, _Node], Any]]] = {
    aten.mm.default: _Emitter.product,
    aten.bmm.default: _Emitter.matmul,
    aten._to_copy.default: _Emitter.cast,
    aten.view.default: _Emitter.view,
    aten.expand.default: _Emitter.expand,
    aten.rsqrt.default: _Emitter.rsqrt,
    aten.pow.Tensor_Scalar: _Emitter.power,
    aten.sum.dim_IntList: _of_kind("ReduceSum"),
    aten.mean.dim: _of_kind("ReduceMean"),
    aten.unsqueeze.default: _Emitter.unsqueeze,
    aten.squeeze.dims: _Emitter.squeeze,
    operator.getitem: _Emitter.item,
    aten.native_layer_norm.default: _Emitter.layer_norm,
    aten.split.Tensor: _Emitter.split,
    aten.split_with_sizes.default: _Emitter.split,
    aten.slice.Tensor: _Emitter.slice,
    aten.slice_backward.default: _Emitter.slice_backward,
    aten.select.int: _Emitter.select,
    aten.select_backward.default: _Emitter.select_backward,
    aten.full.default: _Emitter.full,
    aten.cat.default: _Emitter.concat,
    aten._softmax.default: _Emitter.softmax,
    aten.where.self: _Emitter.where,
    aten.scalar_tensor.default: _Emitter.scalar,
    aten.index.Tensor: _Emitter.index,
    aten.index_put.default: _Emitter.index_backward,
    aten.log1p.default: _Emitter.log1p,
    aten.expm1.default: _Emitter.expm1,
    aten.repeat.default: _Emitter.repeat,
}
