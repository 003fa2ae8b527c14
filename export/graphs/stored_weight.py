"""How graphs of the two ends take a weight that is stored narrow, and widen it: in the text of ONNX, and in torch.

===== ======================================== ===================================
dtype inputs                                   wide
===== ======================================== ===================================
fp32  weight (rows, width)                     as it is
fp16  weight (rows, width)                     cast
int8  weight (rows, width), row_scales (rows,) cast; row scales go where they are cheapest
int4  weight (rows, groups, 16 or 8) int8,     ``int4.widened``
      group_scales (rows, groups, 1) fp16
===== ======================================== ===================================
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from dlora.export.tracing.int4 import LOWEST, group_size, widened
from dlora.protocol.errors import ExportError
from dlora.protocol.manifest import StoredDtype, TensorSpec

CONSTANTS: Final = f"""
        sixteenth = Constant <value = float {{{1 / 16!r}}}> ()
        sixteen = Constant <value = float {{16.0}}> ()
        lowest = Constant <value = float {{{float(LOWEST)!r}}}> ()
"""
"""What ``widen`` of int4 needs."""


def weight_inputs(dtype: StoredDtype, rows: int, width: int) -> tuple[TensorSpec, ...]:
    """The graph inputs that a weight (rows, width) is; raises ``ExportError`` for a width that has no groups."""
    if dtype == "int4":
        size = group_size(width)
        if size is None:
            raise ExportError(f"rows of {width} numbers cannot be stored in int4")
        groups = width // size
        return (
            TensorSpec("weight", "int8", (rows, groups, size // 2)),
            TensorSpec("group_scales", "fp16", (rows, groups, 1)),
        )
    weight = TensorSpec("weight", dtype, (rows, width))
    return (weight, TensorSpec("row_scales", "fp32", (rows,))) if dtype == "int8" else (weight,)


def pick(dtype: StoredDtype, p: str, operator: str) -> str:
    """``{p}stored``, and ``{p}group_scales`` where there are any: rows that ``operator`` picks, ``Gather`` or
    ``Slice``, with ``{}`` in the place of what it picks from."""
    names = ("stored", "group_scales") if dtype == "int4" else ("stored",)
    sources = {"stored": "weight", "group_scales": "group_scales"}
    return "".join(f"{p}{name} = {operator.format(sources[name])}\n" for name in names)


def widen(dtype: StoredDtype, p: str, width: int) -> str:
    """``{p}wide``, float32 (…, width), of what ``pick`` gives; row scales are not in it."""
    if dtype == "fp32":
        return f"{p}wide = Identity ({p}stored)\n"
    if dtype != "int4":
        return f"{p}wide = Cast <to = 1> ({p}stored)\n"
    return f"""
        {p}float = Cast <to = 1> ({p}stored)
        {p}sixteenth = Mul ({p}float, sixteenth)
        {p}second = Floor ({p}sixteenth)
        {p}upper = Mul ({p}second, sixteen)
        {p}lower = Sub ({p}float, {p}upper)
        {p}first_half = Add ({p}lower, lowest)
        {p}values = Concat <axis = 2> ({p}first_half, {p}second)
        {p}float_scales = Cast <to = 1> ({p}group_scales)
        {p}scaled_groups = Mul ({p}values, {p}float_scales)
        {p}shape = Constant <value = int64[2] {{-1, {width}}}> ()
        {p}wide = Reshape ({p}scaled_groups, {p}shape)
    """


def wide(weight: Tensor, group_scales: Tensor | None) -> Tensor:
    """float32 (rows, width) of a stored weight; row scales are not in it."""
    return weight.float() if group_scales is None else widened(weight, group_scales)
