"""Runs every graph on every engine against torch. The bundle is written only if all are exact enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from dlora.cloud.model.base_model import BaseModel, EmbeddingEnd, model_code
from dlora.export.graphs.arrays import Arrays
from dlora.export.graphs.golden_case import GoldenCase, Run
from dlora.export.graphs.graph import TrainingGraph
from dlora.export.graphs.tolerances import Rounding, relative_error
from dlora.protocol.errors import ExportError

from .to_executorch import BOUNDS, load_program, to_executorch

ROWS: Final = 8


@dataclass(frozen=True)
class Verified:
    """A graph, how exact it is, and its golden vectors.

    Attributes:
        models: the graph in each engine's form.
        errors: of each engine, the largest error of any output, relative to the output's largest magnitude;
            tolerance: their bound, and that of any device.
        golden: ``in.<name>`` and ``out.<name>``: inputs, without the bundle's weights, and torch's outputs.
    """

    graph: TrainingGraph
    models: dict[str, bytes]
    errors: dict[str, float]
    tolerance: float
    golden: Arrays

    @property
    def error(self) -> float:
        """The largest of all engines."""
        return max(self.errors.values())


@dataclass(frozen=True)
class Compiled:
    """A graph in an engine's form, and how to run that: inputs in the graph's order to outputs in its order."""

    model: bytes
    run: Run


Engines = Mapping[str, Callable[[TrainingGraph], Compiled]]
"""How each engine that a bundle is for compiles a graph, by the engine's name."""


def compile_onnx(graph: TrainingGraph) -> Compiled:
    """For onnxruntime."""
    model = graph.to_onnx().SerializeToString(deterministic=True)
    session = start_session(model)
    names = [spec.name for spec in graph.outputs]
    return Compiled(model, lambda inputs: session.run(names, inputs))


def compile_executorch(graph: TrainingGraph, bounds: Mapping[str, int] = BOUNDS) -> Compiled:
    """For ExecuTorch, tried on its own Python runtime; ``bounds`` as in ``to_executorch``."""
    model = to_executorch(graph, bounds)
    return Compiled(model, load_program(model))


def compilers(names: Iterable[str], bounds: Mapping[str, int]) -> Engines:
    """Of the engines of these names."""
    known: Engines = {"onnx": compile_onnx, "executorch": partial(compile_executorch, bounds=bounds)}
    return {name: known[name] for name in names}


ONNX_ONLY: Final[Engines] = {"onnx": compile_onnx}


def start_session(model: bytes) -> onnxruntime.InferenceSession:
    """An onnxruntime session with the options that a device uses."""
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def real_hidden_states(base: BaseModel, embedding: EmbeddingEnd, rows: int = ROWS) -> npt.NDArray[np.float32]:
    """The last hidden states of ``rows`` random tokens, float32 (rows, hidden_size)."""
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, len(embedding.weight), (1, rows)))
    with torch.no_grad(), model_code(base.name, base.architecture):
        return base.last_hidden_state(embedding(ids))[0].float().numpy()


def verify(graph: TrainingGraph, tests: Iterable[GoldenCase], engines: Engines = ONNX_ONLY) -> Verified:
    """Run ``graph`` on every engine through all its tests; errors and golden vectors are the last one's.

    Raises ``ExportError`` where an output is beyond its tolerance, or what rounding costs beyond its bound.
    """
    compiled = {name: compile_graph(graph) for name, compile_graph in engines.items()}
    for test in tests:
        verified = _verify(graph, test, compiled)
    return verified


def _verify(graph: TrainingGraph, test: GoldenCase, compiled: Mapping[str, Compiled]) -> Verified:
    golden, bounds = dict(test.exact), dict.fromkeys(test.exact, 0.0)
    if test.rounding is not None:
        golden, bounds = dict(test.rounding.golden), dict(test.rounding.bounds)
        _check_rounding(graph, test.exact, test.rounding)
    errors: dict[str, float] = {}
    given: list[Arrays] = []
    found: dict[str, Arrays] = {}
    for engine, each in compiled.items():
        given.append(test.inputs(each.run) if callable(test.inputs) else test.inputs)
        outputs = dict(zip([spec.name for spec in graph.outputs], each.run(given[-1]), strict=True))
        for name, value in test.exact.items():
            error = relative_error(outputs[name], value)
            if not error <= test.tolerances[name]:
                raise ExportError(
                    f"the graph {graph.name} is not exact enough: {name} is off by {error:.1e} on {engine}, "
                    f"allowed is {test.tolerances[name]:.0e}; no bundle was written"
                )
            errors[engine] = max(errors.get(engine, 0.0), relative_error(outputs[name], golden[name]))
        found[engine] = outputs
    if test.choose is not None:
        golden |= test.choose(found)
    vectors = {f"in.{name}": value for name, value in given[0].items() if name not in graph.weights}
    vectors |= {f"out.{name}": value for name, value in golden.items()}
    models = {engine: each.model for engine, each in compiled.items()}
    tolerance = max(test.tolerances[name] + bounds[name] for name in test.exact)
    return Verified(graph, models, errors, tolerance, vectors)


def _check_rounding(graph: TrainingGraph, exact: Arrays, rounding: Rounding) -> None:
    """The golden outputs are within the bounds of the exact ones."""
    for name, value in exact.items():
        error = relative_error(value, rounding.golden[name])
        if not error <= rounding.bounds[name]:
            finer = {"int4": "int8, fp16 or fp32", "int8": "fp16 or fp32"}.get(rounding.dtype, "fp32")
            raise ExportError(
                f"{rounding.dtype} is too coarse for the {rounding.end} of this model: {name} of {graph.name} is off "
                f"by {error:.1e}, allowed is {rounding.bounds[name]:.0e}; use --{rounding.end}-dtype {finer}"
            )
