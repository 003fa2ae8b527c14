"""The bundle's graphs on ExecuTorch, through the shim: no torch, and nothing of the weights is copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Final

import numpy as np

from dlora.protocol.errors import BundleError, UsageError
from dlora.protocol.manifest import GraphKind, GraphSpec, TensorSpec

from .bundle import Bundle
from .engine import DTYPES, Array, Graph, check_inputs
from .shim import Program, load_shim

_LEAST_ROWS: Final = 8  # of the head for each thread: every one of them reads the whole weight
_CUT: Final = ("tokens", "rows", "n")  # what a call may have more of than the bound
_WHOLE: Final = {  # what it may not, and what to do
    "rank": "lower --rank",
    "positions": "lower --batch-size or --max-length",
    "labelled": "lower --batch-size or --max-length",
    "first": "lower --batch-size or --max-length",
    "new": "say less",
    "past": "say less",
}


class ExecutorchEngine:
    """ExecuTorch on the CPU.

    Its matrix kernels have one thread. The head, nearly all of a device's work, gets the others here: its rows are
    shared out among programs of their own.
    """

    name = "executorch"

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        spec = bundle.manifest.executorch
        if spec is None:
            raise BundleError(f"{bundle.path} has no executorch graphs; export it again with --engine both")
        if missing := {*_WHOLE, *_CUT} - set(spec.bounds):
            raise BundleError(f"{bundle.path} has no bounds for {', '.join(sorted(missing))}; export it again")
        self._bundle = bundle
        self._bounds = spec.bounds
        self._shim = load_shim()
        if _minor(spec.version) > _minor(self._shim.version):
            raise BundleError(
                f"{bundle.path} was exported with executorch {spec.version}, the engine of this device has "
                f"{self._shim.version}; update the engine, or export the bundle with that version"
            )
        self._shim.set_threads(1)
        self._threads = threads or os.cpu_count() or 1
        self._workers: ThreadPoolExecutor | None = None
        self.description = f"ExecuTorch {self._shim.version}"

    def load(self, kind: GraphKind, key: str = "") -> Graph:
        """Load one graph. Raises ``BundleError`` where it is damaged, or not what the manifest describes."""
        spec, path = self._bundle.graph_file(kind, key, self.name)
        threads = self._threads if kind in ("head_train", "head_loss") else 1
        if threads > 1 and self._workers is None:
            self._workers = ThreadPoolExecutor(threads, "head")
        graph = _CutGraph(spec, self._bounds, lambda: self._shim.load(path), threads, self._workers)
        # A program that takes and gives something else would be called with wrong memory.
        wanted = [
            [(tensor.dtype, _shape(tensor, self._bounds)) for tensor in tensors]
            for tensors in (spec.inputs, spec.outputs)
        ]
        if graph.programs[0].signature() != wanted:
            raise BundleError(f"{path} is not the graph that the manifest describes; export the bundle again")
        return graph


class _CutGraph:
    """A graph that takes any number of tokens, rows or parameters: in pieces where programs take fewer.

    Outputs that have the dimension are put together again. Those that do not, gradients of weights, are sums over it.

    Attributes:
        programs: the same several times, for threads that run it at once; ``load`` loads another when it is needed.
    """

    def __init__(
        self,
        spec: GraphSpec,
        bounds: Mapping[str, int],
        load: Callable[[], Program],
        threads: int,
        workers: ThreadPoolExecutor | None,
    ) -> None:
        self.programs = [load()]
        self._spec = spec
        self._bounds = bounds
        self._load = load
        self._threads = threads
        self._workers = workers
        named = {size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)}
        self._dimension = next((name for name in _CUT if name in named), None)

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        given, sizes = check_inputs(self._spec, inputs)
        self._check_bounds(sizes)
        arrays = [np.asarray(array, order="C") for array in given]  # itself where it lies as programs want it
        if 0 in sizes.values():
            return [np.zeros(_shape(tensor, sizes), DTYPES[tensor.dtype]) for tensor in self._spec.outputs]
        edges = self._edges(sizes)
        if len(edges) == 2:
            return self._run(0, arrays, sizes)
        assert self._dimension is not None
        pieces = [
            (self._part(arrays, start, end), sizes | {self._dimension: end - start}) for start, end in pairwise(edges)
        ]
        if self._threads > 1 and self._workers is not None:
            while len(self.programs) < min(self._threads, len(pieces)):
                self.programs.append(self._load())  # here: not by two threads at once
            found = list(self._workers.map(lambda index: self._run_pieces(index, pieces), range(self._threads)))
            results = [found[index % self._threads][index // self._threads] for index in range(len(pieces))]
        else:
            results = [self._run(0, *piece) for piece in pieces]
        by_output = zip(*results, strict=True)
        return [self._joined(tensor, parts) for tensor, parts in zip(self._spec.outputs, by_output, strict=True)]

    def _run_pieces(self, worker: int, pieces: Sequence[tuple[list[Array], Mapping[str, int]]]) -> list[list[Array]]:
        return [self._run(worker, *piece) for piece in pieces[worker :: self._threads]]

    def _run(self, program: int, arrays: list[Array], sizes: Mapping[str, int]) -> list[Array]:
        outputs = [np.empty(_shape(tensor, sizes), DTYPES[tensor.dtype]) for tensor in self._spec.outputs]
        self.programs[program].run(arrays, outputs)
        return outputs

    def _check_bounds(self, sizes: Mapping[str, int]) -> None:
        for name, advice in _WHOLE.items():
            if sizes.get(name, 1) > self._bounds[name]:
                what = f"rank {sizes[name]} is" if name == "rank" else f"a micro-batch of {sizes[name]} tokens is"
                raise UsageError(
                    f"{what} more than this bundle's ExecuTorch programs take ({self._bounds[name]}); {advice}, or use "
                    "--engine onnx"
                )

    def _edges(self, sizes: Mapping[str, int]) -> list[int]:
        """Where the pieces begin, and the end."""
        if self._dimension is None:
            return [0, 1]
        size, bound = sizes[self._dimension], self._bounds[self._dimension]
        pieces = -(-size // bound)
        if self._threads > 1:
            pieces = max(pieces, min(self._threads, size // _LEAST_ROWS))
        return [size * index // pieces for index in range(pieces + 1)]

    def _part(self, arrays: Sequence[Array], start: int, end: int) -> list[Array]:
        # The dimension is the first one wherever it stands, so a part is contiguous and no copy.
        return [
            array[start:end] if tensor.shape[:1] == (self._dimension,) else array
            for tensor, array in zip(self._spec.inputs, arrays, strict=True)
        ]

    def _joined(self, tensor: TensorSpec, parts: Sequence[Array]) -> Array:
        if tensor.shape[:1] == (self._dimension,):
            return np.concatenate(parts)
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total


def _shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes.get(size, 0) if isinstance(size, str) else size for size in tensor.shape)


def _minor(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)
