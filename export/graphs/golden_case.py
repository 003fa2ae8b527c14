"""How a graph is put to the test: inputs, the outputs that are right for them, and how near an engine must come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dlora.cloud.model.base_model import EmbeddingEnd, HeadEnd
from dlora.protocol.manifest import EmbeddingSpec, HeadSpec

from .arrays import Arrays
from .block_materials import DeviceBlocks
from .graph import TrainingGraph
from .tolerances import Rounding, allowed

Run = Callable[[Arrays], list[npt.NDArray[np.generic]]]
"""A graph on an engine: inputs in the graph's order to outputs in its order."""


@dataclass(frozen=True)
class GoldenCase:
    """Inputs of a graph, the right outputs for them, and how far from these an engine's may be.

    Attributes:
        inputs: in the graph's order; or what makes them where the graph itself must run before, step after step.
        exact: torch's outputs. Those that are not in it are left to ``choose``.
        tolerances: by the output's name; see ``tolerances.py``.
        rounding: where ``exact`` is of a weight that was rounded.
        choose: given what each engine found, by the engines' names: the golden outputs that are right by another
            rule than nearness. Raises ``ExportError`` where one is wrong.
    """

    inputs: Arrays | Callable[[Run], Arrays]
    exact: Arrays
    tolerances: Mapping[str, float]
    rounding: Rounding | None = None
    choose: Callable[[Mapping[str, Arrays]], Arrays] | None = None

    @classmethod
    def of(cls, graph: TrainingGraph, values: Arrays, reference: Callable[[Arrays, torch.dtype], Arrays]) -> GoldenCase:
        """``values`` has every input of the graph, and ``reference`` gives every output in a precision of torch."""
        exact, single = (reference(values, dtype) for dtype in (torch.float64, torch.float32))
        exact = {spec.name: exact[spec.name] for spec in graph.outputs}
        return cls({spec.name: values[spec.name] for spec in graph.inputs}, exact, allowed(exact, single))


@dataclass(frozen=True)
class Materials:
    """What the graphs of a bundle are made from, and tried on.

    Attributes:
        shapes: (in_features, out_features) of adapters, each once.
        rank, scaling: of the adapters that are tried; graphs work with any.
        embedding, head: the base model's ends; ``…_spec``: how the bundle stores them; ``…_weights``: the graph inputs
            that are the bundle's own weights.
        hidden_states: last hidden states of the base model, float32 (rows, hidden_size).
        device_blocks: the blocks that a device may run, if any.
    """

    shapes: tuple[tuple[int, int], ...]
    rank: int
    scaling: float
    embedding: EmbeddingEnd
    embedding_spec: EmbeddingSpec
    embedding_weights: Arrays
    head: HeadEnd
    head_spec: HeadSpec
    head_weights: Arrays
    hidden_states: npt.NDArray[np.float32]
    device_blocks: DeviceBlocks | None = None


GraphWithCases = tuple[TrainingGraph, Iterable[GoldenCase]]
"""A graph and its tests. The last one's inputs and outputs become the golden vectors."""
