"""The peak learning rate of a run that names none.

A core learns by heart quickly. Where a run passes over the same few answers again and again, half the rate for each
doubling of passes does best on held-out data; where many examples share an answer, as in classification, all of the
rate does. Figures: docs/decisions/0038-a-rate-for-few-data.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dlora.edge.data.examples import Dataset
from dlora.protocol.choices import KindChoice

from .defaults import DEFAULTS


class ChosenRate(NamedTuple):
    """A learning rate, and why it is not the kind's own; no reason where it is."""

    lr: float
    reason: str = ""


def choose_learning_rate(kind: KindChoice, dataset: Dataset, passes: float) -> ChosenRate:
    """The kind's, or half of it for each doubling of passes over answers that occur once; of training data only.

    Args:
        passes: of the whole run over the data set.
    """
    defaults = DEFAULTS[kind]
    if not defaults.lr_falls_with_passes:
        return ChosenRate(defaults.lr)
    different, share = different_examples(dataset)
    passes *= len(dataset) / different
    halvings = round(math.log2(1 + share * max(0.0, passes - 1)))
    if not halvings:
        return ChosenRate(defaults.lr)
    return ChosenRate(defaults.lr / 2**halvings, f"{passes:.1f} passes over {different:,} different examples")


def different_examples(dataset: Dataset) -> tuple[int, float]:
    """How many examples there are, the same one counted once, and the share of them whose answer no other has."""
    hashes = ((hash(each.ids.tobytes()), hash(each.labels.tobytes())) for each in dataset)
    found = np.fromiter(hashes, np.dtype((np.int64, 2)), len(dataset))
    _, first = np.unique(found[:, 0], return_index=True)
    _, counts = np.unique(found[first, 1], return_counts=True)
    return len(first), float((counts == 1).sum()) / len(first)
