"""Runs every graph on every engine against torch. The bundle is written only if all are exact enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from dlora.cloud.model.base_model import BaseModel, EmbeddingEnd, HeadEnd, model_code
from dlora.export.graphs.graph import TrainingGraph
from dlora.export.graphs.head_graph import HeadShape
from dlora.export.graphs.reference import Arrays, Inputs
from dlora.protocol.errors import ExportError
from dlora.protocol.manifest import StoredDtype

from .graphs import reference
from .to_executorch import load_program, to_executorch, torch_module
from .tolerances import ADAMW_TOLERANCE, EMBEDDING_TOLERANCES, HEAD_ROUNDING, Rounding, allowed, relative_error

TOKENS: Final = 7
ROWS: Final = 8
_WEIGHT_INPUTS: Final = frozenset({"weight", "row_scales", "bias"})


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
    run: Callable[[Arrays], list[npt.NDArray[Any]]]


Engines = Mapping[str, Callable[[TrainingGraph], Compiled]]
"""How each engine that a bundle is for compiles a graph, by the engine's name."""


def compile_onnx(graph: TrainingGraph) -> Compiled:
    """For onnxruntime."""
    model = graph.to_onnx().SerializeToString(deterministic=True)
    session = start_session(model)
    names = [spec.name for spec in graph.outputs]
    return Compiled(model, lambda inputs: session.run(names, inputs))


def compile_executorch(graph: TrainingGraph, head: HeadShape | None = None, scale: float = 1.0) -> Compiled:
    """For ExecuTorch, tried on its own Python runtime; ``head`` and ``scale`` as for ``torch_module``."""
    model = to_executorch(graph, torch_module(graph, head, scale))
    return Compiled(model, load_program(model))


ONNX_ONLY: Final[Engines] = {"onnx": compile_onnx}


def start_session(model: bytes) -> onnxruntime.InferenceSession:
    """An onnxruntime session with the options that a device uses."""
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def verify_adapter(
    graph: TrainingGraph, in_features: int, out_features: int, rank: int, scale: float, engines: Engines = ONNX_ONLY
) -> Verified:
    """An adapter graph, on random tokens; a second time with another rank and number of tokens."""
    compiled = compile_all(graph, engines)
    for tokens, some_rank in ((TOKENS - 2, rank + 3), (TOKENS, rank)):
        random = np.random.default_rng(0)
        values = {
            "x": _normal(random, tokens, in_features),
            "grad": _normal(random, tokens, out_features),
            "lora_A": _normal(random, some_rank, in_features) / np.float32(in_features**0.5),
            "lora_B": _normal(random, out_features, some_rank),
            "scale": np.array(scale, np.float32),
        }
        values["z"] = values["x"] @ values["lora_A"].T
        values["dz"] = values["scale"] * (values["grad"] @ values["lora_B"])
        inputs: Arrays = {spec.name: values[spec.name] for spec in graph.inputs}
        exact, single = (_adapter(graph, inputs, values, dtype) for dtype in (torch.float64, torch.float32))
        verified = verify(graph, inputs, exact, allowed(exact, single), compiled)
    return verified


def _adapter(graph: TrainingGraph, inputs: Arrays, values: Inputs, dtype: torch.dtype) -> Arrays:
    if graph.kind == "adapter_forward":
        return reference.adapter_forward(inputs, dtype)
    if graph.kind == "adapter_input_grad":
        return reference.adapter_input_grad(inputs, dtype)
    lora_a, lora_b = (torch.from_numpy(values[name]) for name in ("lora_A", "lora_B"))
    return reference.adapter_weight_grad(inputs, lora_a, lora_b, dtype)


def verify_adamw(graph: TrainingGraph, engines: Engines = ONNX_ONLY) -> Verified:
    """The AdamW graph over 20 steps of each engine; the golden vectors are the last one's, of the first engine."""
    random = np.random.default_rng(0)
    param, grads = _normal(random, 257), _normal(random, reference.ADAMW_STEPS, 257)
    expected = reference.adamw(torch.from_numpy(param), torch.from_numpy(grads))
    tolerances = dict.fromkeys(expected, ADAMW_TOLERANCE)
    verified = []
    for name, compiled in compile_all(graph, engines).items():
        state = {"param": param, "exp_avg": np.zeros_like(param), "exp_avg_sq": np.zeros_like(param)}
        inputs: Arrays = {}
        for step, grad in enumerate(grads, 1):
            values = {**state, "grad": grad, **reference.adamw_scalars(step)}
            inputs = {spec.name: values[spec.name] for spec in graph.inputs}
            state = dict(zip(state, compiled.run(inputs), strict=True))
        verified.append(verify(graph, inputs, expected, tolerances, {name: compiled}))
    first = verified[0]
    models = {name: model for each in verified for name, model in each.models.items()}
    errors = {name: error for each in verified for name, error in each.errors.items()}
    return Verified(graph, models, errors, first.tolerance, first.golden)


def verify_embedding(
    graph: TrainingGraph, end: EmbeddingEnd, weights: Arrays, engines: Engines = ONNX_ONLY
) -> Verified:
    """The embedding of random tokens against the base model's."""
    ids = np.random.default_rng(0).integers(0, len(end.weight), TOKENS)
    inputs = {**weights, "ids": ids}
    expected = reference.embedding(inputs, end)
    dtype = graph.inputs[0].dtype
    tolerances = dict.fromkeys(expected, EMBEDDING_TOLERANCES[dtype])
    return verify(graph, inputs, expected, tolerances, compile_all(graph, engines))


def verify_head(
    graph: TrainingGraph,
    end: HeadEnd,
    weights: Arrays,
    hidden_states: npt.NDArray[np.float32],
    engines: Engines = ONNX_ONLY,
) -> Verified:
    """A head graph on hidden states of the base model; labels are random.

    Its arithmetic is judged with the weight that it is given. What the rounding of that weight changes comes on top
    and has bounds of its own, ``HEAD_ROUNDING``; the golden vectors have the base model's weight. Raises
    ``ExportError`` where either is too much.
    """
    random = np.random.default_rng(1)
    values = {
        **weights,
        "hidden_states": hidden_states,
        "labels": random.integers(0, len(end.weight), len(hidden_states)),
        "grad_scale": np.array(0.125, np.float32),
    }
    inputs = {spec.name: values[spec.name] for spec in graph.inputs}
    dtype: StoredDtype = graph.inputs[0].dtype  # type: ignore[assignment]
    golden = reference.head(inputs, end, graph.kind)
    exact = golden if dtype == "fp32" else reference.head(inputs, end, graph.kind, stored=True)
    single = reference.head(inputs, end, graph.kind, torch.float32, stored=dtype != "fp32")
    tolerances = allowed(exact, single)
    compiled = compile_all(graph, engines)
    if graph.kind == "head_loss":  # logits are no output of it, but say which predictions are right
        logits = exact["logits"]
        golden, exact = ({"losses": each["losses"]} for each in (golden, exact))
        predictions = _predictions(graph, inputs, logits, tolerances["logits"], compiled)
    verified = verify(graph, inputs, exact, tolerances, compiled, Rounding(dtype, golden, HEAD_ROUNDING[dtype]))
    if graph.kind == "head_loss":
        verified.golden["out.predictions"] = predictions
    return verified


def _predictions(
    graph: TrainingGraph,
    inputs: Arrays,
    logits: npt.NDArray[np.generic],
    tolerance: float,
    compiled: Mapping[str, Compiled],
) -> npt.NDArray[np.generic]:
    """The tokens that all engines predict. Of two that are as good as equal, the graph's own choice is golden."""
    place = [spec.name for spec in graph.outputs].index("predictions")
    found = [each.run(inputs)[place] for each in compiled.values()]
    for name, tokens in zip(compiled, found, strict=True):
        chosen = np.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
        worse = float((logits.max(axis=1) - chosen).max() / np.abs(logits).max())
        if not worse <= tolerance or not np.array_equal(tokens, found[0]):
            raise ExportError(f"the graph head_loss predicts other tokens on {name} than elsewhere: a bug in dlora")
    return found[0]


def real_hidden_states(base: BaseModel, embedding: EmbeddingEnd, rows: int = ROWS) -> npt.NDArray[np.float32]:
    """The last hidden states of ``rows`` random tokens, float32 (rows, hidden_size)."""
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, len(embedding.weight), (1, rows)))
    with torch.no_grad(), model_code(base.name, base.architecture):
        return base.last_hidden_state(embedding(ids))[0].float().numpy()


def compile_all(graph: TrainingGraph, engines: Engines) -> dict[str, Compiled]:
    """The graph for each engine."""
    return {name: compile_graph(graph) for name, compile_graph in engines.items()}


def verify(
    graph: TrainingGraph,
    inputs: Arrays,
    exact: Arrays,
    tolerances: Mapping[str, float],
    compiled: Mapping[str, Compiled] | None = None,
    rounding: Rounding | None = None,
) -> Verified:
    """Run ``graph`` on every engine and compare.

    Args:
        exact: the right outputs for these inputs; tolerances: how far from them an engine's may be.
        rounding: where ``exact`` is of a weight that was rounded.

    Raises ``ExportError`` where an output is beyond its tolerance, or rounding beyond its bound.
    """
    compiled = compile_all(graph, ONNX_ONLY) if compiled is None else compiled
    golden = exact if rounding is None else rounding.golden
    bounds = dict.fromkeys(exact, 0.0) if rounding is None else rounding.bounds
    for name, value in exact.items():
        error = relative_error(value, golden[name])
        if rounding is not None and not error <= bounds[name]:
            finer = "fp16 or fp32" if rounding.dtype == "int8" else "fp32"
            raise ExportError(
                f"{rounding.dtype} is too coarse for the head of this model: {name} of {graph.name} is off by "
                f"{error:.1e}, allowed is {bounds[name]:.0e}; use --head-dtype {finer}"
            )
    errors: dict[str, float] = {}
    for engine, each in compiled.items():
        found = dict(zip([spec.name for spec in graph.outputs], each.run(inputs), strict=True))
        for name, value in exact.items():
            error = relative_error(found[name], value)
            if not error <= tolerances[name]:
                raise ExportError(
                    f"the graph {graph.name} is not exact enough: {name} is off by {error:.1e} on {engine}, "
                    f"allowed is {tolerances[name]:.0e}; no bundle was written"
                )
            errors[engine] = max(errors.get(engine, 0.0), relative_error(found[name], golden[name]))
    vectors = {f"in.{name}": value for name, value in inputs.items() if name not in _WEIGHT_INPUTS}
    vectors |= {f"out.{name}": value for name, value in golden.items()}
    models = {engine: each.model for engine, each in compiled.items()}
    tolerance = max(tolerances[name] + bounds[name] for name in exact)
    return Verified(graph, models, errors, tolerance, vectors)


def _normal(random: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    return random.standard_normal(shape, np.float32)
