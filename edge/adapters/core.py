"""One trained matrix behind what crosses the wire, on the bundle's graphs."""

from __future__ import annotations

from dlora.edge.engine.engine import scalar
from dlora.protocol.tensors import FloatArray

from .kind import LoadGraph, Parameter


class Core:
    """``out = scale * z C^T``, with C (width, r) a parameter.

    Args:
        graph_key: of its graphs, as ``core_key`` gives it.
    """

    def __init__(self, parameter: Parameter, graph_key: str) -> None:
        self.parameter = parameter
        self._key = graph_key

    def load_graphs(self, load: LoadGraph) -> None:
        """Load what the methods below run. Raises ``BundleError`` where the bundle has no such graph."""
        self._forward, self._input_grad, self._weight_grad = (
            load(kind, self._key) for kind in ("core_forward", "core_input_grad", "core_weight_grad")
        )

    def forward(self, z: FloatArray, scale: float) -> FloatArray:
        """(rows, width)."""
        (out,) = self._forward({"z": z, "core": self.parameter.value, "scale": scalar(scale)})
        return out

    def input_grad(self, grad: FloatArray, scale: float) -> FloatArray:
        """The gradient of z, (rows, r)."""
        (dz,) = self._input_grad({"grad": grad, "core": self.parameter.value, "scale": scalar(scale)})
        return dz

    def weight_grad(self, z: FloatArray, grad: FloatArray, scale: float) -> FloatArray:
        """The gradient of C, (width, r)."""
        (grad_core,) = self._weight_grad({"z": z, "grad": grad, "scale": scalar(scale)})
        return grad_core
