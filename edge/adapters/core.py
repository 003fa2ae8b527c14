"""Adapters of which a server keeps a part: behind what crosses stand trained matrices, on the bundle's graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from dlora.edge.engine.engine import scalar
from dlora.protocol.tensors import FloatArray

from .kind import GroupAdapters, LoadGraph, Parameter


class Core:
    """``out = scale * z C^T``, with C (width, r) a parameter.

    ``graph_key``: of its graphs, as ``core_key`` gives it.
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


class CoreGroup(GroupAdapters):
    """The cores of one exchange group: each makes one of the tensors that go to the server, of the same z (rows, r).

    ``cores``: by the full names of their parameters, in the order in which they cross.
    """

    def __init__(self, name: str, cores: Mapping[str, Core], scaling: float) -> None:
        super().__init__(name)
        self.cores = dict(cores)
        self.scaling = scaling

    def parameters(self) -> dict[str, Parameter]:
        return {name: core.parameter for name, core in self.cores.items()}

    def load_graphs(self, load: LoadGraph) -> None:
        for core in self.cores.values():
            core.load_graphs(load)

    def forward(self, x: FloatArray, scale: float) -> tuple[list[FloatArray], None]:
        return [core.forward(x, self.scaling * scale) for core in self.cores.values()], None

    def input_grad(self, grads: Sequence[FloatArray], scale: float) -> tuple[FloatArray, None]:
        """The gradient of z (rows, r), summed over the cores."""
        pairs = zip(self.cores.values(), grads, strict=True)
        return reduce(np.add, [core.input_grad(grad, self.scaling * scale) for core, grad in pairs]), None

    def weight_grads(
        self, x: FloatArray, forward: Any, grads: Sequence[FloatArray], backward: Any, scale: float
    ) -> dict[str, FloatArray]:
        pairs = zip(self.cores.items(), grads, strict=True)
        return {name: core.weight_grad(x, grad, self.scaling * scale) for (name, core), grad in pairs}

    def given_to_server(self) -> list[FloatArray]:
        return [core.parameter.value * np.float32(self.scaling) for core in self.cores.values()]
