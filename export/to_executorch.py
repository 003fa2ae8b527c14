"""Training graphs to ExecuTorch programs. The only module that imports ``executorch``, and only when it is asked for.

A program's inputs and outputs are the caller's memory: nothing of them is planned, so that weights are read where they
are mapped. What is planned are the tensors in between, at the size of the bounds; a device touches no page of it that
a run does not need, so generous bounds cost address space and no memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dlora.export.graphs.arrays import Arrays
from dlora.export.graphs.graph import TrainingGraph
from dlora.protocol.errors import ExportError, MissingExtraError
from dlora.protocol.manifest import TensorSpec

from .installed import check_executorch

# What a program takes at most of each dynamic dimension. Devices cut what is longer into pieces, all but the rank,
# ``positions``, which are tokens that see each other, ``labelled``, which are some of these, ``first``, which they come
# after, and ``past``, which those see that are ``new``.
BOUNDS: Final = {
    "tokens": 4096, "rank": 256, "rows": 256, "n": 1 << 20, "positions": 1024, "labelled": 1024, "new": 128,
    "past": 8192, "first": 1024,
}  # fmt: skip
# All different, so that none is taken for another.
_EXAMPLE: Final = {
    "tokens": 7, "rank": 5, "rows": 6, "n": 9, "positions": 11, "labelled": 8, "new": 13, "past": 17, "first": 19,
}  # fmt: skip
_DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8, "int64": torch.int64}


def bounds_for(max_length: int) -> dict[str, int]:
    """``BOUNDS`` of a base model whose tables have rows for ``max_length`` tokens.

    Some families cut a table by how many tokens there are, past and new ones. torch.export assumes two new ones at
    least, and wants to know that the table is never too short.
    """
    return {**BOUNDS, **{name: min(BOUNDS[name], max_length - 2) for name in ("past", "first")}}


def to_executorch(graph: TrainingGraph, bounds: Mapping[str, int] = BOUNDS) -> bytes:
    """The program of a graph, which takes at most ``bounds`` of each dynamic dimension.

    Raises ``ExportError`` where executorch cannot make it.
    """
    exir = _executorch()
    examples = tuple(_example(spec) for spec in graph.inputs)
    try:
        with _without_output():
            sizes = _dynamic(graph, bounds)
            exported = torch.export.export(graph.module(), examples, dynamic_shapes=sizes, strict=False)
            # Linear stays, for its kernel reads the weight as it lies; mm would want a transposed copy.
            kept = [torch.ops.aten.linear.default]
            config = exir.EdgeCompileConfig(preserve_ops=kept, _check_ir_validity=False)
            planning = exir.passes.MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
            program = exir.to_edge(exported, compile_config=config).to_executorch(
                exir.ExecutorchBackendConfig(memory_planning_pass=planning)
            )
            return bytes(program.buffer)
    except Exception as error:  # of torch.export and executorch, which have no common base
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ExportError(f"executorch cannot export the graph {graph.name}: {reason}") from None


def load_program(model: bytes) -> Callable[[Arrays], list[npt.NDArray[Any]]]:
    """The program on executorch's own Python runtime; arrays in the order of the graph's inputs."""
    _executorch()
    with _without_output():
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(model)
        method = program.load_method("forward")

    def run(inputs: Arrays) -> list[npt.NDArray[Any]]:
        with _without_output():  # the first run says aloud what processor it finds
            # Mapped weights are read-only, and only read.
            tensors = [torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape) for value in inputs.values()]
            return [output.numpy().copy() for output in method.execute(tensors)]

    # The method points into the program.
    run.program = program  # type: ignore[attr-defined]
    return run


def _example(spec: TensorSpec) -> Tensor:
    shape = [_EXAMPLE[size] if isinstance(size, str) else size for size in spec.shape]
    # Of large weights no page is ever touched: export looks at shapes only.
    return torch.empty(shape, dtype=_DTYPES[spec.dtype])


def _dynamic(graph: TrainingGraph, bounds: Mapping[str, int]) -> Any:
    dims = {name: torch.export.Dim(name, min=1, max=bound) for name, bound in bounds.items()}
    # The modules' *tensors count as one argument.
    return (
        tuple(
            {axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in graph.inputs
        ),
    )


@cache
def _executorch() -> Any:
    """``executorch.exir``; importing it takes seconds."""
    check_executorch()
    with _without_output():
        try:
            import executorch.exir
            import executorch.exir.passes
        except ImportError as error:
            raise MissingExtraError(
                f"executorch cannot be imported ({error}); pip install 'dlora[executorch]'"
            ) from None
    return executorch.exir


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
    """Without what executorch, torchao and torch.export tell of themselves, on stderr's descriptor too."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
        logging.disable(level)
