"""A training graph in its two forms, ONNX text and torch module, with every weight and state among its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
        body: its nodes, in ONNX's textual syntax, or as they are.
        module: makes its torch form, of which ExecuTorch programs are made: the same inputs in the same order.
        key: widths that tell graphs of one kind apart (``"576x192"``), a number for blocks, else empty.
        weights: the inputs that are the bundle's own weights, and no golden vectors.
    """

    kind: GraphKind
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    body: str | Sequence[onnx.NodeProto]
    module: Callable[[], nn.Module]
    key: str = ""
    weights: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """``kind`` or ``kind.key``: the stem of its file and the prefix of its golden vectors."""
        return f"{self.kind}.{self.key}" if self.key else self.kind

    def to_onnx(self) -> onnx.ModelProto:
        """The checked ONNX model. Raises ``ExportError`` where an input of it is consumed by no node."""
        if not isinstance(self.body, str):
            return self._checked(self._model_of_nodes(self.body))
        text = (
            f'<ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}], producer_name: "dlora">\n'
            f"{self.kind} ({_declare(self.inputs)}) => ({_declare(self.outputs)}) {{\n{self.body}\n}}"
        )
        return self._checked(onnx.parser.parse_model(text))

    def body_text(self) -> str:
        """What tells its nodes from those of others."""
        return self.body if isinstance(self.body, str) else "".join(str(node) for node in self.body)

    def _model_of_nodes(self, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
        graph = onnx.helper.make_graph(nodes, self.kind, _value_infos(self.inputs), _value_infos(self.outputs))
        opsets = [onnx.helper.make_opsetid("", OPSET)]
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="dlora")

    def _checked(self, model: onnx.ModelProto) -> onnx.ModelProto:
        _drop_unused_constants(model.graph)
        onnx.checker.check_model(model, full_check=True)
        unused = {spec.name for spec in self.inputs} - set(_consumed(model.graph.node))
        if unused:
            raise ExportError(f"the graph {self.name} does not use its inputs {sorted(unused)}: a bug in dlora")
        return model


def _value_infos(specs: tuple[TensorSpec, ...]) -> list[onnx.ValueInfoProto]:
    types = {"fp32": "FLOAT", "fp16": "FLOAT16", "int8": "INT8", "int64": "INT64"}
    return [
        onnx.helper.make_tensor_value_info(spec.name, onnx.TensorProto.DataType.Value(types[spec.dtype]), spec.shape)
        for spec in specs
    ]


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
