"""What runs a bundle's graphs, as the rest of the device sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dlora.protocol.manifest import GraphKind
from dlora.protocol.tensors import FloatArray

Array = npt.NDArray[Any]


class Graph(Protocol):
    """A loaded graph: arrays in by name, arrays out in the manifest's order. Inputs are read, never written."""

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]: ...


class Engine(Protocol):
    """Loads a bundle's graphs.

    Attributes:
        name: the key of its files in the manifest (``onnx``).
        description: name and version, for people.
    """

    name: str
    description: str

    def load(self, kind: GraphKind, key: str = "") -> Graph: ...


def scalar(value: float) -> FloatArray:
    """A 0-d float32 input; ``np.float32(2)`` is no array, and engines refuse it."""
    return np.array(value, np.float32)
