"""The token embedding: a row of the table for each token, times the family's scale (Gemma)."""

from __future__ import annotations

from typing import Literal

from dlora.protocol.manifest import TensorSpec

from .graph import TrainingGraph


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
    )
