"""The token embedding: a row of the table for each token, times the family's scale (Gemma)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dlora.cloud.model.base_model import EmbeddingEnd
from dlora.protocol.manifest import TensorSpec

from .arrays import Arrays, to_floats
from .golden_case import GoldenCase, GraphWithCases, Materials
from .graph import Computed, TrainingGraph

KINDS: Final = ("embedding",)
TOLERANCES: Final[dict[str, float]] = {"fp32": 1e-7, "fp16": 1e-3}  # one product; the weight's rounding
TOKENS: Final = 7


def embedding_graph(
    vocabulary_size: int, embedding_size: int, dtype: Literal["fp32", "fp16"], scale: float
) -> TrainingGraph:
    """``embedding``: weight (vocabulary, embedding_size), ids (tokens,) to hidden_states (tokens, embedding_size)."""
    return TrainingGraph(
        "embedding",
        inputs=(
            TensorSpec("weight", dtype, (vocabulary_size, embedding_size)),
            TensorSpec("ids", "int64", ("tokens",)),
        ),
        outputs=(TensorSpec("hidden_states", "fp32", ("tokens", embedding_size)),),
        body=f"""
            scale = Constant <value = float {{{scale!r}}}> ()
            rows = Gather <axis = 0> (weight, ids)
            wide = Cast <to = 1> (rows)
            hidden_states = Mul (wide, scale)
        """,
        module=partial(Computed, partial(embedding, scale=scale)),
        weights=frozenset(("weight",)),
    )


def embedding(weight: Tensor, ids: Tensor, scale: float) -> Tensor:
    """The rows of ``weight`` (vocabulary, embedding_size) that ``ids`` (tokens,) name, in float32, times ``scale``."""
    return nn.functional.embedding(ids, weight).float() * scale


def embedding_tests(graph: TrainingGraph, end: EmbeddingEnd, weights: Arrays) -> Iterator[GoldenCase]:
    """Random tokens: the base model's own float32 embedding, whatever precision the graph's weight is stored in."""
    ids = np.random.default_rng(0).integers(0, len(end.weight), TOKENS)
    exact = to_floats(hidden_states=end(torch.from_numpy(ids)))
    yield GoldenCase({**weights, "ids": ids}, exact, dict.fromkeys(exact, TOLERANCES[graph.inputs[0].dtype]))


def make(materials: Materials) -> Iterator[GraphWithCases]:
    """The one graph of this family."""
    spec, end = materials.embedding_spec, materials.embedding
    rows, width = end.weight.shape
    graph = embedding_graph(rows, width, spec.dtype, spec.scale)
    yield graph, embedding_tests(graph, end, materials.embedding_weights)
