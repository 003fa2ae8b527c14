"""When a graph is exact enough.

How exact float32 can be depends on how many numbers a graph adds up, and on how they cancel. So an engine is not held
to a constant but to torch: its error, from what torch computes in float64, may be a few times that of torch in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from dlora.export.graphs.reference import Arrays
from dlora.protocol.manifest import StoredDtype

FACTOR: Final = 4.0  # of torch's own error: another order of sums; up to 3 times was seen
FLOOR: Final = 2e-6  # and 17 units in the last place besides, where torch happens to be nearly exact
CEILING: Final = 1e-3  # whatever torch's own error is, more is no rounding
ADAMW_TOLERANCE: Final = 2e-7  # about one unit in the last place, after 20 steps; nothing is added up
EMBEDDING_TOLERANCES: Final[dict[str, float]] = {"fp32": 1e-7, "fp16": 1e-3}  # one product; the weight's rounding
HEAD_ROUNDING: Final[dict[StoredDtype, dict[str, float]]] = {
    # What a rounded weight may change; the loss sees it only in the mean, but the gradient in every row.
    "fp32": {"losses": 0.0, "grad_hidden_states": 0.0, "logits": 0.0},
    "fp16": {"losses": 1e-3, "grad_hidden_states": 2e-3, "logits": 1e-3},
    "int8": {"losses": 2e-2, "grad_hidden_states": 5e-2, "logits": 5e-2},
}


@dataclass(frozen=True)
class Rounding:
    """What it costs to store a weight as ``dtype``.

    Attributes:
        golden: the outputs of the weight as it was.
        bounds: how far those of the stored one may be from them.
    """

    dtype: StoredDtype
    golden: Arrays
    bounds: Mapping[str, float]


def allowed(exact: Arrays, single: Arrays) -> dict[str, float]:
    """How far an engine's outputs may be from ``exact``, torch's in float64, given those ``single`` in float32."""
    return {
        name: min(CEILING, _rounded_up(FLOOR + FACTOR * relative_error(single[name], value)))
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
