"""Intervals of means, by resampling examples: the percentile bootstrap (Efron, 1979)."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]

RESAMPLES: Final = 2000
LEVEL: Final = 0.95
_SEED: Final = 0
_AT_ONCE: Final = 1 << 22  # numbers drawn


class Interval(NamedTuple):
    """A mean, and where it lies at the level of ``LEVEL``."""

    mean: float
    low: float
    high: float


def interval(sums: Numbers, counts: Numbers | None = None) -> Interval:
    """The mean of what examples hold, ``sums.sum() / counts.sum()``, with its interval.

    ``sums``: (examples,); ``counts``: (examples,), how much each is a sum of; None: one.

    Where all examples are wholly right, or wholly wrong, resampling them says nothing; then it reaches as far as the
    rule of three has it: 3 / examples.
    """
    counted = np.ones(len(sums)) if counts is None else np.asarray(counts, np.float64)
    values = np.asarray(sums, np.float64)
    mean = float(values.sum() / counted.sum())
    if np.ptp(values) == 0 and np.ptp(counted) == 0 and mean in (0.0, 1.0):
        reach = min(1.0, 3 / len(values))
        return Interval(mean, max(0.0, mean - reach) if mean else 0.0, min(1.0, mean + reach) if not mean else 1.0)
    return _resampled(values, counted)


def difference(first: Numbers, second: Numbers, counts: Numbers | None = None) -> Interval:
    """How much the mean of ``first`` is above that of ``second``, of the same examples: each is drawn with its pair."""
    values = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return _resampled(values, np.ones(len(values)) if counts is None else np.asarray(counts, np.float64))


def _resampled(values: Doubles, counts: Doubles) -> Interval:
    low, high = np.quantile(_means(values, counts), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.sum() / counts.sum()), float(low), float(high))


def _means(values: Doubles, counts: Doubles) -> Doubles:
    """The mean of each resample, (RESAMPLES,)."""
    generator, examples = np.random.default_rng(_SEED), len(values)
    found = []
    for start in range(0, RESAMPLES, size := max(1, _AT_ONCE // examples)):
        drawn = generator.integers(0, examples, (min(size, RESAMPLES - start), examples))
        found.append(values[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(found)
