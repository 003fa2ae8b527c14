"""How often a run passes over its examples, and what that makes of its learning rate.

Adapters learn by heart quickly. Where a run passes over the same answers again and again, half the rate for each
doubling of passes beyond two does best on held-out data; where many examples share an answer, as in classification,
all of it. Figures: docs/log/decisions/0038-half-the-rate-for-twice-the-passes.md and
0065-a-first-rate-from-the-model-and-the-data.md.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from dlora.edge.data.batches import steps_an_epoch
from dlora.edge.data.examples import Dataset

CLASS_EXAMPLES: Final = 4
"""An answer that so many different examples have is a class; with fewer, it is their own."""
MOST_HALVINGS: Final = 2  # measured up to nine passes
LEAST_STEPS: Final = 16
"""A run's steps at its rate are never less than so many at all of it: with less, it learns too little."""


def halvings(dataset: Dataset, *, steps: int, examples_a_step: int) -> int:
    """How often the rate is halved: once for each doubling of passes over examples whose answers are their own, beyond
    two of them.

    Held-out data have no part in this.

    Args:
        steps: of the whole run.
    """
    different, own = different_examples(dataset)
    passes = steps / steps_an_epoch(len(dataset), examples_a_step) * len(dataset) / different
    wanted = round(math.log2(1 + own / different * max(0.0, passes - 1))) - 1
    return max(0, min(wanted, MOST_HALVINGS, math.floor(math.log2(max(1.0, steps / LEAST_STEPS)))))


def different_examples(dataset: Dataset) -> tuple[int, int]:
    """How many examples there are, the same one counted once, and how many of them have an answer of their own."""
    hashes = ((hash(each.ids.tobytes()), hash(each.labels.tobytes())) for each in dataset)
    found = np.fromiter(hashes, np.dtype((np.int64, 2)), len(dataset))
    _, first = np.unique(found[:, 0], return_index=True)
    _, counts = np.unique(found[first, 1], return_counts=True)
    return len(first), int(counts[counts < CLASS_EXAMPLES].sum())
