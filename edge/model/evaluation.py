"""How good adapters are on held-out data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlora.edge.data.batches import evaluation_batches
from dlora.edge.data.examples import Dataset

from .split import SplitModel
from .trunk import TrunkModel

TrainableModel = SplitModel | TrunkModel
"""What a run needs of a model, wherever its blocks are."""


@dataclass(frozen=True)
class Evaluation:
    """Mean loss a labelled token, share of tokens predicted right, and share of examples wholly right."""

    loss: float
    token_accuracy: float
    exact_match: float
    tokens: int
    examples: int


@dataclass(frozen=True)
class ExampleScores:
    """What was found of each example, (examples,) each.

    Attributes:
        losses: summed over its labels; right: labels predicted right; labels: how many it has.
    """

    losses: npt.NDArray[np.float64]
    right: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


def evaluate(
    model: TrainableModel, dataset: Dataset, batch_size: int, progress: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Loss and accuracy of the adapters as they are, which act where the model says; as ``evaluate_examples``."""
    return evaluate_examples(model, dataset, batch_size, progress)[0]


def evaluate_examples(
    model: TrainableModel, dataset: Dataset, batch_size: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Evaluation, ExampleScores]:
    """Likewise, and of each example.

    ``progress`` is called after each micro-batch with the number of its examples, and of all.
    Raises what the model's ``evaluate`` raises.
    """
    losses, right, tokens, exact = 0.0, 0, 0, 0
    each = list[tuple[npt.NDArray[Any], ...]]()
    for batch in evaluation_batches(dataset.acting_on_answers(model.invocation), batch_size):
        found, predictions = model.evaluate(batch)
        losses += float(found.sum(dtype=np.float64))
        correct = predictions == batch.labels
        right += int(correct.sum())
        tokens += len(correct)
        sequence = np.searchsorted(np.cumsum(batch.sequence_lengths), batch.label_positions, side="right")
        exact += len(batch.sequence_lengths) - len(np.unique(sequence[~correct]))
        of_labels = (found, correct, np.ones(len(found)))
        each.append(tuple(np.bincount(sequence, values, len(batch.sequence_lengths)) for values in of_labels))
        if progress is not None:
            progress(len(batch.sequence_lengths), len(dataset))
    sums, rights, labels = (np.concatenate(parts) for parts in zip(*each, strict=True))
    scores = ExampleScores(sums, rights.astype(np.int64), labels.astype(np.int64))
    return Evaluation(losses / tokens, right / tokens, exact / len(dataset), tokens, len(dataset)), scores
