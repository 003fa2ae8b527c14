"""A training graph in its two forms, ONNX text and torch module, with every weight and state among its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import onnx
from torch import nn

from dlora.protocol.errors import ExportError
from dlora.protocol.manifest import GraphKind, TensorSpec

OPSET: Final = 18
IR_VERSION: Final = 9  # onnxruntime 1.20 reads up to 10
_ONNX_TYPES: Final = {"fp32": "float", "fp16": "float16", "int8": "int8", "int64": "int64"}


@dataclass(frozen=True)
class TrainingGraph:
    """One graph of the bundle.

    Attributes:
        body: its nodes, in ONNX's textual syntax.
        module: makes its torch form, of which ExecuTorch programs are made: the same inputs in the same order.
        key: widths that tell graphs of one kind apart (``"576x192"``), else empty.
    """

    kind: GraphKind
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    body: str
    module: Callable[[], nn.Module]
    key: str = ""

    @property
    def name(self) -> str:
        """``kind`` or ``kind.key``: the stem of its file and the prefix of its golden vectors."""
        return f"{self.kind}.{self.key}" if self.key else self.kind

    def to_onnx(self) -> onnx.ModelProto:
        """The checked ONNX model. Raises ``ExportError`` where an input of it is consumed by no node."""
        text = (
            f'<ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}], producer_name: "dlora">\n'
            f"{self.kind} ({_declare(self.inputs)}) => ({_declare(self.outputs)}) {{\n{self.body}\n}}"
        )
        model = onnx.parser.parse_model(text)
        _drop_unused_constants(model.graph)
        onnx.checker.check_model(model, full_check=True)
        unused = {spec.name for spec in self.inputs} - set(_consumed(model.graph.node))
        if unused:
            raise ExportError(f"the graph {self.name} does not use its inputs {sorted(unused)}: a bug in dlora")
        return model


def _declare(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{_ONNX_TYPES[spec.dtype]}{_dimensions(spec)} {spec.name}" for spec in specs)


def _dimensions(spec: TensorSpec) -> str:
    # A type without brackets is a scalar; empty brackets would mean "of unknown rank".
    return f"[{', '.join(map(str, spec.shape))}]" if spec.shape else ""


def _drop_unused_constants(graph: onnx.GraphProto) -> None:
    # Bodies declare all that any variant of a graph needs; onnxruntime would warn of each one left over.
    consumed = set(_consumed(graph.node))
    kept = [node for node in graph.node if node.op_type != "Constant" or node.output[0] in consumed]
    del graph.node[:]
    graph.node.extend(kept)


def _consumed(nodes: Iterable[onnx.NodeProto]) -> Iterable[str]:
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            yield from _consumed(attribute.g.node)
