"""The peak learning rate of a run that names none: found from the model and the data, before the first step.

AdamW's first update moves each parameter that has a gradient by the learning rate, whatever the gradient's size. How
large it may be until it does harm differs a lot between models and data, and the best rate of a whole run differs with
it, by a rule for each kind of adapter. So the first update is tried in several sizes, on the examples of the next
steps.

Adapters learn by heart quickly. Where a run passes over the same answers again and again, half the rate for each
doubling of passes beyond two does best on held-out data; where many examples share an answer, as in classification,
all of it. Figures: docs/log/decisions/0038-half-the-rate-for-twice-the-passes.md and
0065-a-first-rate-from-the-model-and-the-data.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from dlora.edge.data.batches import steps_an_epoch
from dlora.edge.data.examples import Dataset
from dlora.protocol.choices import KindChoice

FIRST_SIZE: Final = 0.02
MOST_TRIES: Final = 12
"""Sizes that are tried at the most, each double or half of the one before."""
USUAL_TRIES: Final = 4
_PROBED_EXAMPLES: Final = 16
CLASS_EXAMPLES: Final = 4
"""An answer that so many different examples have is a class; with fewer, it is their own."""
MOST_HALVINGS: Final = 2  # measured up to nine passes
LEAST_STEPS: Final = 16
"""A run's steps at its rate are never less than so many at all of it: with less, it learns too little."""


def probed_steps(examples_a_step: int, total_steps: int) -> range:
    """The steps whose examples say what an update is worth: 16 examples of the steps after the first, or all of one's;
    of a run of one step, that one."""
    after = range(1, 1 + math.ceil(_PROBED_EXAMPLES / examples_a_step))
    return after[: total_steps - 1] or range(1)


def rate_for_size(kind: KindChoice, size: float, *, halvings: int, on_device: bool, in_passes: bool = False) -> float:
    """The peak learning rate of a run whose best first update has that size.

    Args:
        halvings: for its passes.
        on_device: whether the blocks that are trained run on the device, where all their linear modules have an
            adapter.
        in_passes: whether groups are asked in passes. What these leave out grows with the square of what adapters add,
            so large sizes count by their root.
    """
    if on_device:
        rate, most = 0.15 * size, 1.6e-2
    elif kind == "lora":  # the first update moves B alone, and later ones the product of A and B
        rate, most = 0.025 * math.sqrt(size), 2e-2
    elif kind == "bottleneck":
        rate, most = 0.5 * size, 4.5e-2
        rate = min(rate, 0.05 * math.sqrt(size)) if in_passes else rate
    else:
        rate, most = size, math.inf
    return min(rate / 2.0**halvings, most)


class FoundRate(NamedTuple):
    """A learning rate, and why.

    ``size``: of the best first update; tries: how many sizes were tried.
    """

    lr: float
    size: float
    tries: int


def find_rate(
    loss_after: Callable[[float], float], rate_of: Callable[[float], float], before_try: Callable[[int, int], None]
) -> FoundRate:
    """Try first updates of several sizes, from ``FIRST_SIZE`` by doubles or halves while the loss falls.

    The best size is where a parabola through the losses at three neighbours has its lowest point, the sizes taken as
    logarithms; a rate has two digits.

    Args:
        loss_after: the loss after an update of a size; infinite where it is no number.
        rate_of: the rate that goes with the best size.
        before_try: called before each try with how many are done, and how many there are at the most.
    """
    tried: dict[int, float] = {}

    def loss_at(place: int) -> float:
        if place not in tried:
            before_try(len(tried), MOST_TRIES)
            tried[place] = loss_after(FIRST_SIZE * 2.0**place)
        return tried[place]

    way = 1 if loss_at(1) < loss_at(0) else -1
    best = max(0, way)
    while len(tried) < MOST_TRIES and (loss_at(best + way) < tried[best] or math.isinf(tried[best])):
        best += way
    size = FIRST_SIZE * 2.0 ** (best + _lowest(*(tried.get(best + step, math.inf) for step in (-1, 0, 1))))
    return FoundRate(float(f"{rate_of(size):.2g}"), size, len(tried))


def _lowest(left: float, middle: float, right: float) -> float:
    """Where the parabola through three points at -1, 0 and 1 is lowest, of which the middle one is the lowest; 0 where
    one of them is no number."""
    bend = left - 2.0 * middle + right
    return 0.5 * (left - right) / bend if math.isfinite(bend) and bend > 0 else 0.0


def halvings(dataset: Dataset, *, steps: int, examples_a_step: int) -> int:
    """How often the rate is halved: once for each doubling of passes over examples whose answers are their own, beyond
    two of them.

    Held-out data have no part in this.

    ``steps``: of the whole run.
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
