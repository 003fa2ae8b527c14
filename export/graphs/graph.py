"""A training graph in its two forms, ONNX text and torch module, with every weight and state among its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import onnx
from torch import nn

from dlora.protocol.errors import ExportError
from dlora.protocol.manifest import GraphKind, TensorSpec

OPSET: Final = 18
IR_VERSION: Final = 9  # onnxruntime 1.20 reads up to 10
Specs = tuple[TensorSpec, ...]
_ONNX_TYPES: Final = {"fp32": "FLOAT", "fp16": "FLOAT16", "int8": "INT8", "int64": "INT64"}


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
    inputs: Specs
    outputs: Specs
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
        nodes = self.body
        if isinstance(nodes, str):
            nodes = onnx.parser.parse_graph(f"nodes () => () {{{nodes}}}").node
        # Bodies declare all that any variant of a graph needs; onnxruntime would warn of each constant left over.
        consumed = set(_consumed(nodes))
        nodes = [node for node in nodes if node.op_type != "Constant" or node.output[0] in consumed]
        graph = onnx.helper.make_graph(nodes, self.kind, _value_infos(self.inputs), _value_infos(self.outputs))
        opsets = [onnx.helper.make_opsetid("", OPSET)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="dlora")
        onnx.checker.check_model(model, full_check=True)
        unused = {spec.name for spec in self.inputs} - consumed
        if unused:
            raise ExportError(f"the graph {self.name} does not use its inputs {sorted(unused)}: a bug in dlora")
        return model


class Computed(nn.Module):
    """A function of tensors as a module, for ``TrainingGraph.module``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *tensors: Any) -> Any:
        return self._function(*tensors)


def _value_infos(specs: Specs) -> list[onnx.ValueInfoProto]:
    return [
        onnx.helper.make_tensor_value_info(
            spec.name, onnx.TensorProto.DataType.Value(_ONNX_TYPES[spec.dtype]), spec.shape
        )
        for spec in specs
    ]


def _consumed(nodes: Iterable[onnx.NodeProto]) -> Iterable[str]:
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            yield from _consumed(attribute.g.node)
