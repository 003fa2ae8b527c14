"""What runs a bundle's graphs, as the rest of the device sees it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import GraphKind, GraphSpec, TensorSpec
from dlora.protocol.tensors import FloatArray

Array = npt.NDArray[Any]

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "fp32": np.dtype("<f4"),
    "fp16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
    "int64": np.dtype("<i8"),
}
"""A manifest's dtypes, and numpy's."""

OF_BLOCKS: Final = ("block_", "last_block_", "answer_block_", "first_rows", "last_first_rows")
"""What kinds of graphs begin with whose weights are those of blocks of the base model."""


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


def check_inputs(graph: GraphSpec, inputs: Mapping[str, Array]) -> tuple[list[Array], dict[str, int]]:
    """The inputs in the graph's order, and the sizes of its dynamic dimensions. Raises ``BundleError``."""
    for tensor in graph.inputs:
        if tensor.name not in inputs:
            raise BundleError(f"the bundle has no {tensor.name}, which its graph {graph.kind} takes; export it again")
    arrays, sizes = [inputs[tensor.name] for tensor in graph.inputs], dict[str, int]()
    check_tensors(graph.inputs, arrays, sizes)
    return arrays, sizes


def check_tensors(tensors: Iterable[TensorSpec], arrays: Iterable[Array], sizes: dict[str, int]) -> None:
    """Check that ``arrays`` are what a manifest says of a graph's inputs, or outputs.

    ``sizes``: of the dynamic dimensions; those that are new are added. A bundle comes from somebody else: its weights
    may be of any shape, and its graphs give what numpy would stretch, or fail at. Raises ``BundleError``.
    """
    for tensor, array in zip(tensors, arrays, strict=True):
        fits = array.dtype == DTYPES[tensor.dtype] and array.ndim == len(tensor.shape)
        if fits and array.shape != tensor.shape:  # some are dynamic
            for name, size in zip(tensor.shape, array.shape, strict=True):
                fits &= size == (sizes.setdefault(name, size) if isinstance(name, str) else name)
        if not fits:
            raise BundleError(f"{tensor.name} has another shape or dtype than its graph says; export the bundle again")
