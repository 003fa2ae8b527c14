"""How good adapters are on held-out data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dlora.edge.data.batches import evaluation_batches
from dlora.edge.data.examples import Dataset

from .trainable import TrainableModel


@dataclass(frozen=True)
class Evaluation:
    """Mean loss a labelled token, share of tokens predicted right, and share of examples wholly right."""

    loss: float
    token_accuracy: float
    exact_match: float
    tokens: int
    examples: int


def evaluate(
    model: TrainableModel, dataset: Dataset, batch_size: int, progress: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Loss and accuracy of the adapters as they are, which act where the model says.

    ``progress`` is called after each micro-batch with the number of its examples, and of all.
    Raises what the model's ``evaluate`` raises.
    """
    losses, right, tokens, exact = 0.0, 0, 0, 0
    for batch in evaluation_batches(dataset.acting_on_answers(model.invocation), batch_size):
        found, predictions = model.evaluate(batch)
        losses += float(found.sum(dtype=np.float64))
        correct = predictions == batch.labels
        right += int(correct.sum())
        tokens += len(correct)
        sequence = np.searchsorted(np.cumsum(batch.sequence_lengths), batch.label_positions, side="right")
        exact += len(batch.sequence_lengths) - len(np.unique(sequence[~correct]))
        if progress is not None:
            progress(len(batch.sequence_lengths), len(dataset))
    return Evaluation(losses / tokens, right / tokens, exact / len(dataset), tokens, len(dataset))
