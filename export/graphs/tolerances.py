"""When a graph is exact enough.

How exact float32 can be depends on how many numbers a graph adds up, and on how they cancel. So an engine is not held
to a constant but to torch: its error, from what torch computes in float64, may be a few times that of torch in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from dlora.protocol.manifest import StoredDtype

from .arrays import Arrays

FACTOR: Final = 4.0  # of torch's own error: another order of sums; up to 3 times was seen
FLOOR: Final = 2e-6  # and 17 units in the last place besides, where torch happens to be nearly exact
BLOCK_FLOOR: Final = 5e-6  # likewise, of whole blocks, where many sums follow each other
CEILING: Final = 1e-3  # whatever torch's own error is, more is no rounding


@dataclass(frozen=True)
class Rounding:
    """What it costs to store the weight of an end as ``dtype``.

    Attributes:
        golden: the outputs of the weight as it was.
        bounds: how far those of the stored one may be from them.
    """

    dtype: StoredDtype
    end: Literal["head", "embedding"]
    golden: Arrays
    bounds: Mapping[str, float]


def allowed(exact: Arrays, single: Arrays, floor: float = FLOOR) -> dict[str, float]:
    """How far an engine's outputs may be from ``exact``, torch's in float64, given those ``single`` in float32."""
    return {
        name: min(CEILING, _rounded_up(floor + FACTOR * relative_error(single[name], value)))
        for name, value in exact.items()
    }


def relative_error(found: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> float:
    """Largest difference relative to the largest magnitude of ``expected``."""
    if found.shape != expected.shape:
        return float("inf")
    wide = expected.astype(np.float64)
    return float(np.abs(found.astype(np.float64) - wide).max() / max(np.abs(wide).max(), 1e-30))


def _rounded_up(value: float) -> float:
    """To two digits, so that it is the same on every machine of a kind."""
    return float(f"{value * 1.05:.1e}")
