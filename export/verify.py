"""Runs every graph on onnxruntime against torch. The bundle is written only if all are exact enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from dlora.cloud.base_model import BaseModel
from dlora.protocol.errors import ExportError
from dlora.protocol.manifest import StoredDtype

from . import reference
from .ends import EmbeddingEnd, HeadEnd
from .graph import TrainingGraph
from .reference import Arrays

EXACT: Final = 0.0
ADAPTER_TOLERANCE: Final = 2e-6  # sums of float32 products in another order than torch's
ADAMW_TOLERANCE: Final = 2e-7  # about one unit in the last place, after 20 steps
EMBEDDING_TOLERANCES: Final[dict[str, float]] = {"fp32": 1e-7, "fp16": 1e-3}
HEAD_TOLERANCES: Final[dict[StoredDtype, dict[str, float]]] = {
    # The weight's rounding, which the loss sees only in the mean but the gradient in every row.
    "fp32": {"losses": 1e-5, "grad_hidden_states": 1e-5, "logits": 1e-5},
    "fp16": {"losses": 1e-3, "grad_hidden_states": 2e-3, "logits": 1e-3},
    "int8": {"losses": 2e-2, "grad_hidden_states": 5e-2, "logits": 5e-2},
}
TOKENS: Final = 7
ROWS: Final = 8
_WEIGHT_INPUTS: Final = frozenset({"weight", "row_scales", "bias"})


@dataclass(frozen=True)
class Verified:
    """A graph, how exact it is, and its golden vectors.

    Attributes:
        error: largest error of any output, relative to the output's largest magnitude; tolerance: its bound.
        golden: ``in.<name>`` and ``out.<name>``: inputs, without the bundle's weights, and torch's outputs.
    """

    graph: TrainingGraph
    model: bytes
    error: float
    tolerance: float
    golden: Arrays


def start_session(model: bytes) -> onnxruntime.InferenceSession:
    """An onnxruntime session with the options that a device uses."""
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def verify_adapter(graph: TrainingGraph, in_features: int, out_features: int, rank: int, scale: float) -> Verified:
    """An adapter graph, on random tokens; a second time with another rank and number of tokens."""
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
        if graph.kind == "adapter_forward":
            expected = reference.adapter_forward(inputs)
        elif graph.kind == "adapter_input_grad":
            expected = reference.adapter_input_grad(inputs)
        else:
            expected = reference.adapter_weight_grad(
                inputs, torch.from_numpy(values["lora_A"]), torch.from_numpy(values["lora_B"])
            )
        verified = verify(graph, inputs, expected, dict.fromkeys(expected, ADAPTER_TOLERANCE))
    return verified


def verify_adamw(graph: TrainingGraph) -> Verified:
    """The AdamW graph over 20 steps; the golden vectors are the last one's."""
    random = np.random.default_rng(0)
    param, grads = _normal(random, 257), _normal(random, reference.ADAMW_STEPS, 257)
    expected = reference.adamw(torch.from_numpy(param), torch.from_numpy(grads))
    model = graph.to_onnx().SerializeToString(deterministic=True)
    session = start_session(model)
    names = ("param", "exp_avg", "exp_avg_sq")
    state = {"param": param, "exp_avg": np.zeros_like(param), "exp_avg_sq": np.zeros_like(param)}
    inputs: Arrays = {}
    for step, grad in enumerate(grads, 1):
        inputs = {**state, "grad": grad, **reference.adamw_scalars(step)}
        state = dict(zip(names, session.run([f"new_{name}" for name in names], inputs), strict=True))
    return verify(graph, inputs, expected, dict.fromkeys(expected, ADAMW_TOLERANCE))


def verify_embedding(graph: TrainingGraph, end: EmbeddingEnd, weights: Arrays) -> Verified:
    """The embedding of random tokens against the base model's."""
    ids = np.random.default_rng(0).integers(0, len(end.weight), TOKENS)
    inputs = {**weights, "ids": ids}
    expected = reference.embedding(inputs, end)
    dtype = graph.inputs[0].dtype
    return verify(graph, inputs, expected, dict.fromkeys(expected, EMBEDDING_TOLERANCES[dtype]))


def verify_head(
    graph: TrainingGraph, end: HeadEnd, weights: Arrays, hidden_states: npt.NDArray[np.float32]
) -> Verified:
    """A head graph on hidden states of the base model; labels are random."""
    random = np.random.default_rng(1)
    values = {
        **weights,
        "hidden_states": hidden_states,
        "labels": random.integers(0, len(end.weight), len(hidden_states)),
        "grad_scale": np.array(0.125, np.float32),
    }
    inputs = {spec.name: values[spec.name] for spec in graph.inputs}
    expected = reference.head(inputs, end, graph.kind)
    dtype: StoredDtype = graph.inputs[0].dtype  # type: ignore[assignment]
    tolerances = HEAD_TOLERANCES[dtype]
    predictions = expected.pop("predictions", None)
    verified = verify(graph, inputs, expected, {name: tolerances[name] for name in expected})
    if predictions is not None:
        # A rounded weight may swap two words that are as good as equal, so the graph's own choice is golden.
        found = start_session(verified.model).run(["predictions"], inputs)[0]
        if dtype == "fp32" and not np.array_equal(found, predictions):
            raise ExportError("the graph head_loss predicts other tokens than torch: a bug in dlora")
        verified.golden["out.predictions"] = found
    return verified


def real_hidden_states(base: BaseModel, embedding: EmbeddingEnd, rows: int = ROWS) -> npt.NDArray[np.float32]:
    """The last hidden states of ``rows`` random tokens, float32 (rows, hidden_size)."""
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, len(embedding.weight), (1, rows)))
    with torch.no_grad():
        return base.last_hidden_state(embedding(ids))[0].float().numpy()


def verify(graph: TrainingGraph, inputs: Arrays, expected: Arrays, tolerances: Mapping[str, float]) -> Verified:
    """Run ``graph`` and compare. Raises ``ExportError`` where an output is beyond its tolerance."""
    model = graph.to_onnx().SerializeToString(deterministic=True)
    names = list(expected)
    found = start_session(model).run(names, inputs)
    errors = {name: relative_error(value, expected[name]) for name, value in zip(names, found, strict=True)}
    for name, error in errors.items():
        if not error <= tolerances[name]:
            raise ExportError(
                f"the graph {graph.name} is not exact enough: {name} is off by {error:.1e}, "
                f"allowed is {tolerances[name]:.0e}; no bundle was written"
            )
    golden = {f"in.{name}": value for name, value in inputs.items() if name not in _WEIGHT_INPUTS}
    golden |= {f"out.{name}": value for name, value in expected.items()}
    return Verified(graph, model, max(errors.values()), max(tolerances.values()), golden)


def relative_error(found: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> float:
    """Largest difference relative to the largest magnitude of ``expected``."""
    if found.shape != expected.shape:
        return float("inf")
    wide = expected.astype(np.float64)
    return float(np.abs(found.astype(np.float64) - wide).max() / max(np.abs(wide).max(), 1e-30))


def _normal(random: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    return random.standard_normal(shape, np.float32)
