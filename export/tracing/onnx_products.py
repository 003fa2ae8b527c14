"""Products in ONNX: transposes go into them, and a stored weight is widened where it is multiplied.

A weight that is large is widened slab by slab, in a Scan over its rows: whole, it would take two or four times what is
stored, and runtimes widen several at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from onnx import NodeProto, TensorProto, helper

from .aten import aten, is_transposed
from .int4 import LOWEST, WIDEN
from .onnx_writer import CannotEmitError, OnnxWriter

SLAB_VALUES: Final = 1 << 20  # of a weight that is widened: 4 MB
INT4_SLAB_VALUES: Final = 1 << 18  # likewise: widening has several copies on the way


def product(writer: OnnxWriter, node: Any) -> str:
    left, left_transposed = _untransposed(node.args[0])
    right, right_transposed = _untransposed(node.args[1])
    if right.target in (aten._to_copy.default, WIDEN):
        return _product_with_stored(writer, left, left_transposed, right, right_transposed)
    one = writer.value(left)
    if left_transposed:  # written out: kernels are bad at products along the long side
        one = writer.add("Transpose", [one], perm=[1, 0])
    operands = [one, writer.value(right)]
    return writer.add("Gemm", operands, transB=1) if right_transposed else writer.add("MatMul", operands)


def _product_with_stored(writer: OnnxWriter, left: Any, left_transposed: bool, cast: Any, is_forward: bool) -> str:
    """x W^T, or grad W, with a weight (out, in) that is widened here."""
    if left_transposed or any(each.op != "placeholder" for each in cast.args):
        raise CannotEmitError("a stored weight in a product of another form")
    rows, columns = cast.meta["val"].shape
    stored, x = [each.meta["name"] for each in cast.args], writer.value(left)
    slabs = _slabs(rows, columns, SLAB_VALUES if len(stored) == 1 else INT4_SLAB_VALUES)
    if slabs == 1:
        writer.count += 1
        writer.nodes += _widening(writer, stored, f"w{writer.count}_", (rows, columns))
        wide = f"w{writer.count}_wide"
        return writer.add("Gemm", [x, wide], transB=1) if is_forward else writer.add("MatMul", [x, wide])
    return _scan(writer, stored, x, slabs, rows // slabs, columns, is_forward=is_forward)


def _widening(writer: OnnxWriter, stored: Sequence[str], p: str, shape: tuple[int, int]) -> list[NodeProto]:
    """Makes ``<p>wide``, float32 ``shape``, of a stored weight, or of one of int4 and its scales."""
    if len(stored) == 1:
        return [helper.make_node("Cast", stored, [f"{p}wide"], to=TensorProto.FLOAT)]
    sixteenth, sixteen, lowest = (writer.constant(value, np.float32) for value in (1 / 16, 16, LOWEST))
    return [  # as int4.widened
        helper.make_node("Cast", [stored[0]], [f"{p}float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{p}float", sixteenth], [f"{p}sixteenth"]),
        helper.make_node("Floor", [f"{p}sixteenth"], [f"{p}second"]),
        helper.make_node("Mul", [f"{p}second", sixteen], [f"{p}upper"]),
        helper.make_node("Sub", [f"{p}float", f"{p}upper"], [f"{p}lower"]),
        helper.make_node("Add", [f"{p}lower", lowest], [f"{p}first"]),
        helper.make_node("Concat", [f"{p}first", f"{p}second"], [f"{p}values"], axis=2),
        helper.make_node("Cast", [stored[1]], [f"{p}scales"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{p}values", f"{p}scales"], [f"{p}scaled"]),
        helper.make_node("Reshape", [f"{p}scaled", writer.integers(*shape)], [f"{p}wide"]),
    ]


def _scan(
    writer: OnnxWriter, stored: Sequence[str], x: str, slabs: int, slab: int, columns: int, *, is_forward: bool
) -> str:
    writer.count += 1
    p = f"s{writer.count}_"
    starts = writer.constant(np.arange(slabs, dtype=np.int64)[:, None] * slab)
    step, axis_0 = writer.integers(slab), writer.integers(0)
    start = helper.make_tensor_value_info(f"{p}start", TensorProto.INT64, [1])
    parts = [f"{p}stored{index}" for index in range(len(stored))]
    body = [
        helper.make_node("Add", [f"{p}start", step], [f"{p}end"]),
        *(
            helper.make_node("Slice", [each, f"{p}start", f"{p}end", axis_0], [part])
            for each, part in zip(stored, parts, strict=True)
        ),
        *_widening(writer, parts, p, (slab, columns)),
    ]
    if is_forward:
        body.append(helper.make_node("Gemm", [f"{p}wide", x], [f"{p}y"], transB=1))  # (slab, tokens)
        found = helper.make_tensor_value_info(f"{p}y", TensorProto.FLOAT, [slab, None])
        stacked = writer.add(
            "Scan", [starts], body=helper.make_graph(body, f"{p}body", [start], [found]), num_scan_inputs=1
        )
        by_row = writer.add("Reshape", [stacked, writer.integers(slabs * slab, -1)])
        return writer.add("Transpose", [by_row], perm=[1, 0])
    by_output = writer.add("Transpose", [x], perm=[1, 0])
    rows = writer.add("Concat", [writer.add("Shape", [x], start=0, end=1), writer.integers(columns)], axis=0)
    zeros = writer.add("Expand", [writer.constant(0, np.float32), rows])
    body += [
        helper.make_node("Slice", [by_output, f"{p}start", f"{p}end", axis_0], [f"{p}x"]),
        helper.make_node("Gemm", [f"{p}x", f"{p}wide", f"{p}sum"], [f"{p}next"], transA=1),
    ]
    before = helper.make_tensor_value_info(f"{p}sum", TensorProto.FLOAT, [None, columns])
    after = helper.make_tensor_value_info(f"{p}next", TensorProto.FLOAT, [None, columns])
    graph = helper.make_graph(body, f"{p}body", [before, start], [after])
    return writer.add("Scan", [zeros, starts], body=graph, num_scan_inputs=1)


def _untransposed(operand: Any) -> tuple[Any, bool]:
    """An operand of a product without its transpose, and whether there was one."""
    return (operand.args[0], True) if is_transposed(operand) else (operand, False)


def is_product_operand(node: Any) -> bool:
    if node.target is aten.mm.default:
        return True
    return node.target is aten.permute.default and all(user.target is aten.mm.default for user in node.users)


def _slabs(rows: int, columns: int, most: int = SLAB_VALUES) -> int:
    """In how many equal parts the rows of a weight are widened, of at most so many values where it comes out even."""
    slabs = 1
    while rows * columns // slabs > most and rows % (2 * slabs) == 0:
        slabs *= 2
    return slabs
