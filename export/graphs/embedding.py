"""The token embedding: a row of the table for each token, times the family's scale (Gemma)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from dlora.cloud.model.base_model import EmbeddingEnd
from dlora.protocol.manifest import StoredDtype, TensorSpec

from .arrays import Arrays, to_floats
from .golden_case import GoldenCase, GraphWithCases, Materials
from .graph import Computed, TrainingGraph
from .stored_weight import CONSTANTS, pick, weight_inputs, wide, widen
from .tolerances import Rounding

KINDS: Final = ("embedding",)
TOLERANCE: Final = 1e-6  # a product or two
ROUNDING: Final[dict[StoredDtype, float]] = {"fp32": 0.0, "fp16": 1e-3, "int8": 2e-2, "int4": 2e-1}
"""What a weight's rounding may change, relative to the largest value."""
TOKENS: Final = 7


def embedding_graph(vocabulary_size: int, embedding_size: int, dtype: StoredDtype, scale: float) -> TrainingGraph:
    """``embedding``: a stored weight (vocabulary, embedding_size), ids (tokens,) to hidden_states
    (tokens, embedding_size)."""
    weights = weight_inputs(dtype, vocabulary_size, embedding_size)
    lines = pick(dtype, "row_", "Gather <axis = 0> ({}, ids)") + widen(dtype, "row_", embedding_size)
    if dtype == "int8":
        lines += """
            axis_1 = Constant <value = int64[1] {1}> ()
            flat_scales = Gather <axis = 0> (row_scales, ids)
            scales = Unsqueeze (flat_scales, axis_1)
            rows = Mul (row_wide, scales)
        """
    else:
        lines += "rows = Identity (row_wide)\n"
    return TrainingGraph(
        "embedding",
        inputs=(*weights, TensorSpec("ids", "int64", ("tokens",))),
        outputs=(TensorSpec("hidden_states", "fp32", ("tokens", embedding_size)),),
        body=f"""
            {CONSTANTS if dtype == "int4" else ""}
            scale = Constant <value = float {{{scale!r}}}> ()
            {lines}
            hidden_states = Mul (rows, scale)
        """,
        module=partial(Computed, partial(embedding, dtype, scale=scale)),
        weights=frozenset(spec.name for spec in weights),
    )


def embedding(dtype: StoredDtype, weight: Tensor, *tensors: Tensor, scale: float) -> Tensor:
    """In float32, times ``scale``: rows of a stored ``weight`` (vocabulary, embedding_size) that ids (tokens,) name,
    the last of ``tensors``; before it stand the weight's scales, where it has any."""
    *scales, ids = tensors
    if dtype == "int4":
        return wide(weight.index_select(0, ids), scales[0].index_select(0, ids)) * scale
    rows = nn.functional.embedding(ids, weight).float()
    if dtype == "int8":
        rows = rows * scales[0].index_select(0, ids).unsqueeze(1)
    return rows * scale


def embedding_tests(
    graph: TrainingGraph, end: EmbeddingEnd, weights: Arrays, dtype: StoredDtype
) -> Iterator[GoldenCase]:
    """Random tokens: the graph is held to the weight that it is given, and that to the base model's own."""
    ids = np.random.default_rng(0).integers(0, len(end.weight), TOKENS)
    golden = to_floats(hidden_states=end(torch.from_numpy(ids)))
    inputs = {spec.name: {**weights, "ids": ids}[spec.name] for spec in graph.inputs}
    tensors = [torch.from_numpy(np.asarray(value)) for value in inputs.values()]
    exact = to_floats(hidden_states=embedding(dtype, *tensors, scale=end.scale))
    rounding = Rounding(dtype, "embedding", golden, dict.fromkeys(golden, ROUNDING[dtype]))
    yield GoldenCase(inputs, exact, dict.fromkeys(exact, TOLERANCE), rounding)


def make(materials: Materials) -> Iterator[GraphWithCases]:
    """The one graph of this family."""
    spec, end = materials.embedding_spec, materials.embedding
    rows, width = end.weight.shape
    graph = embedding_graph(rows, width, spec.dtype, spec.scale)
    yield graph, embedding_tests(graph, end, materials.embedding_weights, spec.dtype)
