"""What an ONNX graph may ask of this device: checked in its bytes, before ONNX Runtime reads any.

A graph is a stranger's program. ONNX has operators that loop for ever, or make a terabyte of one number, and ONNX
Runtime has no limit. So a graph holds the few things that training graphs are made of (docs/reference/bundle.md) and
nothing else; what these still ask for too much of fails where it is allocated (``memory.limit_memory``). There is no
``onnx`` on the device: this reads as much of protobuf's encoding (protobuf.dev/programming-guides/encoding) as it
takes, with the field numbers of onnx.proto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

OPERATORS: Final = frozenset(
    (
        "Add", "ArgMax", "Cast", "Concat", "Constant", "Div", "Equal", "Erf", "Exp", "Expand", "Floor", "Gather",
        "Gemm", "Greater", "Identity", "Less", "LessOrEqual", "Log", "MatMul", "Max", "Min", "Mul", "Neg", "Pad",
        "Reciprocal", "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Round", "Scan", "Shape", "Sigmoid",
        "Slice", "Softmax", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where",
    )
)  # fmt: skip
MAX_GRAPH_BYTES: Final = 256 << 10  # 10 KiB are usual: weights are inputs

_LENGTH_DELIMITED: Final = 2
_FIXED: Final = {1: 8, 5: 4}  # wire type to bytes
# Fields of onnx.proto that may be there; the names of those that are looked into.
_MODEL: Final = {1: "", 2: "", 3: "", 4: "", 5: "", 6: "", 7: "graph", 8: "", 14: ""}
_GRAPH: Final = {1: "node", 2: "", 10: "", 11: "", 12: "", 13: ""}  # no initializers: weights are inputs
_NODE: Final = {1: "input", 2: "output", 3: "", 4: "op_type", 5: "attribute", 6: "", 7: "domain"}
_ATTRIBUTE: Final = {1: "", 2: "", 3: "", 4: "", 5: "tensor", 6: "graph", 7: "", 8: "", 9: "", 13: "", 20: ""}
_DIMS, _MAX_DIMS = 1, 8  # of a tensor
_TENSOR: Final = dict.fromkeys((_DIMS, 2, 4, 5, 7, 8, 9, 10, 11, 12), "")

_Field = tuple[int, int, int | bytes]


def check_graph(content: bytes) -> None:
    """Raise ``ValueError``, with what it has, unless ``content`` is a model of nothing but what a graph may have."""
    if len(content) > MAX_GRAPH_BYTES:
        raise ValueError(f"more than {MAX_GRAPH_BYTES >> 10} KiB")
    for _, graph in _known_fields(content, _MODEL, "a model"):
        _check_nodes(graph)


def _check_nodes(graph: bytes, *, is_of_scan: bool = False) -> None:
    constants: set[bytes] = set()
    for _, node in _known_fields(graph, _GRAPH, "a graph"):
        found = {"op_type": b"", "domain": b"", "input": b"", "output": b""}
        attributes = []
        for name, value in _known_fields(node, _NODE, "a node"):
            if name == "attribute":
                attributes.append(value)
            else:
                found[name] = value  # of several inputs or outputs the last
        operator = found["op_type"].decode(errors="replace")
        if operator not in OPERATORS or found["domain"] not in (b"", b"ai.onnx"):
            raise ValueError(f"the operator {operator!r}")
        if operator == "Constant":
            constants.add(found["output"])
        elif operator == "Scan" and found["input"] not in constants:
            # What it goes over is as long as what stands in these bytes, and no longer.
            raise ValueError("a Scan over something other than a constant")
        for attribute in attributes:
            held = list(_known_fields(attribute, _ATTRIBUTE, "an attribute"))
            if len(held) > 1:
                raise ValueError("an attribute of two values")
            for name, value in held:
                if name == "tensor":
                    _check_tensor(value)
                elif operator != "Scan" or is_of_scan:
                    raise ValueError(f"a graph in {operator}")
                else:
                    _check_nodes(value, is_of_scan=True)


def _check_tensor(tensor: bytes) -> None:
    dims: list[int] = []
    for number, kind, value in _fields(tensor):
        if number not in _TENSOR:
            raise ValueError(f"field {number} in a tensor")
        if number == _DIMS:
            if kind in _FIXED:  # whoever reads it passes it over
                raise ValueError("a tensor's dimension of a wrong type")
            dims += [value] if isinstance(value, int) else _varints(value)
    # Half a byte each at the least; and a dimension beside one of 0 is no longer for that.
    if len(dims) > _MAX_DIMS or math.prod(max(size, 1) for size in dims) > 2 * len(tensor):
        raise ValueError("a tensor that claims to be larger than it is")


def _known_fields(message: bytes, known: dict[int, str], what: str) -> Iterator[tuple[str, bytes]]:
    """The fields of a message that are looked into, by name; raises for one that may not be there."""
    for number, _, value in _fields(message):
        if number not in known:
            raise ValueError(f"field {number} in {what}")
        if known[number]:
            if not isinstance(value, bytes):
                raise ValueError(f"field {number} of a wrong type in {what}")
            yield known[number], value


def _fields(message: bytes) -> Iterator[_Field]:
    """Number, wire type and value of every field: an integer, or the bytes of anything longer."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield number, kind, value
            continue
        if kind == _LENGTH_DELIMITED:
            length, at = _varint(message, at)
        elif kind in _FIXED:
            length = _FIXED[kind]
        else:
            raise ValueError("no protobuf")
        if at + length > len(message):
            raise ValueError("a field that is cut off")
        yield number, kind, message[at : at + length]
        at += length


def _varints(packed: bytes) -> list[int]:
    found, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        found.append(value)
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number that does not end")
