"""Writes ONNX nodes, one after the other: what every operator of a traced graph needs for that."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import fx

from .aten import aten


class CannotEmitError(Exception):
    """An operator, or a form of one, that has no ONNX here."""


class OnnxWriter:
    """The nodes of one traced graph.

    Attributes:
        graph: the traced one.
        values: the name of each of its nodes' value, or of several.
        nodes: those written so far.
        count: of names that were given.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.values: dict[fx.Node, Any] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.count = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._sizes: dict[str, str] = {}  # of what torch calls a size to the value that holds it
        self._open: dict[str, tuple[str, int]] = {}  # where a size can be read off
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = node.meta["name"]
                for axis, size in enumerate(node.meta["val"].shape):
                    if not isinstance(size, int):
                        self._open[str(size)] = node.meta["name"], axis

    def add(self, kind: str, inputs: Sequence[str], outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Append a node; returns the name of its first output."""
        if not outputs:
            self.count += 1
            outputs = [f"v{self.count}"]
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), **attributes))
        return outputs[0]

    def constant(self, value: Any, dtype: Any = None) -> str:
        array = np.asarray(value, dtype)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = f"c{len(self._constants)}"
            tensor = numpy_helper.from_array(array)
            self.nodes.append(helper.make_node("Constant", [], [self._constants[key]], value=tensor))
        return self._constants[key]

    def integers(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def value(self, operand: Any, like: Any | None = None) -> str:
        """The value of an operand, which may be a number."""
        if isinstance(operand, fx.Node):
            if operand not in self.values and operand.target is aten.permute.default:
                self.values[operand] = self.add("Transpose", [self.value(operand.args[0])], perm=operand.args[1])
            found: str = self.values[operand]
            return found
        is_integer = like is not None and like.meta["val"].dtype == torch.int64
        return self.constant(operand, np.int64 if is_integer else np.float32)

    def shape(self, shape: Sequence[Any]) -> str:
        """A shape as int64, sizes that are open read off the inputs."""
        if all(isinstance(size, int) for size in shape):
            return self.integers(*shape)
        parts = [self.integers(size) if isinstance(size, int) else self.size(size) for size in shape]
        return self.add("Concat", parts, axis=0) if len(parts) > 1 else parts[0]

    def size(self, size: Any) -> str:
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
                parts = [self.size(part) for part in expression.args]
                kind = "Add" if expression.is_Add else "Mul"
                self._sizes[key] = functools.reduce(lambda one, other: self.add(kind, [one, other]), parts)
            else:
                raise CannotEmitError(f"a size {key} that is none of an input's")
        return self._sizes[key]

    def reshape(self, value: str, shape: Sequence[Any]) -> str:
        if sum(not isinstance(size, int) for size in shape) <= 1:
            sizes = self.integers(*(size if isinstance(size, int) else -1 for size in shape))
            return self.add("Reshape", [value, sizes])
        return self.add("Reshape", [value, self.shape(shape)])
