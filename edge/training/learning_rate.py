"""The peak learning rate of a run that names none.

Adapters learn by heart quickly. Where a run passes over the same answers again and again, half the rate for each
doubling of passes does best on held-out data; where many examples share an answer, as in classification, all of it.
Figures: docs/decisions/0038-half-the-rate-for-twice-the-passes.md and 0064-every-kinds-rate-falls-with-passes.md.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np

from dlora.edge.data.batches import steps_an_epoch
from dlora.edge.data.examples import Dataset
from dlora.protocol.choices import KindChoice

from .defaults import default_lr

CLASS_EXAMPLES: Final = 4
"""An answer that so many different examples have is a class; with fewer, it is their own."""
MOST_HALVINGS: Final = 3  # measured up to nine passes
LEAST_STEPS: Final = 8
"""A run's steps at its rate are never less than so many at the kind's own: with less, it learns too little."""


class ChosenRate(NamedTuple):
    """A learning rate, and why it is not the kind's own; no reason where it is."""

    lr: float
    reason: str = ""


def choose_learning_rate(
    kind: KindChoice, dataset: Dataset, *, steps: int, examples_a_step: int, on_device: bool = False
) -> ChosenRate:
    """The kind's, or half of it for each doubling of passes over examples whose answers are their own.

    Held-out data have no part in this.

    Args:
        steps: of the whole run.
        on_device: as ``default_lr`` has it.
    """
    lr = default_lr(kind, on_device=on_device)
    different, own = different_examples(dataset)
    passes = steps / steps_an_epoch(len(dataset), examples_a_step) * len(dataset) / different
    wanted = round(math.log2(1 + own / different * max(0.0, passes - 1)))
    halvings = min(wanted, MOST_HALVINGS, math.floor(math.log2(max(1.0, steps / LEAST_STEPS))))
    if not halvings:
        return ChosenRate(lr)
    examples = f"{different:,} different example{'s' * (different > 1)}"
    reason = f"{passes:.1f} passes over {examples}, {own:,} with answers of their own"
    return ChosenRate(lr / 2**halvings, reason)


def different_examples(dataset: Dataset) -> tuple[int, int]:
    """How many examples there are, the same one counted once, and how many of them have an answer of their own."""
    hashes = ((hash(each.ids.tobytes()), hash(each.labels.tobytes())) for each in dataset)
    found = np.fromiter(hashes, np.dtype((np.int64, 2)), len(dataset))
    _, first = np.unique(found[:, 0], return_index=True)
    _, counts = np.unique(found[first, 1], return_counts=True)
    return len(first), int(counts[counts < CLASS_EXAMPLES].sum())
