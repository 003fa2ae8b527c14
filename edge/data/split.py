"""Which rows are held out where there are no held-out data: always the same ones of the same data."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from dlora.protocol.errors import DataError, UsageError

Split = float | Literal["auto"]
"""The share of rows that is held out: above 0 and below 1; 0: none; ``auto``: a tenth, but ``MOST_AUTO`` at most, and
none of fewer than ``FEWEST_AUTO`` rows."""

AUTO_SHARE: Final = 0.1
FEWEST_AUTO: Final = 20
MOST_AUTO: Final = 200  # an evaluation costs as much traffic as training on as many examples does


def parse_split(text: str) -> Split:
    """``auto`` or a share. Raises ``UsageError``."""
    if text == "auto":
        return "auto"
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UsageError(f"--hold-out {text} is not understood; write a share such as 0.1, 0 for none, or auto")
    return share


def held_out_rows(digests: npt.NDArray[np.uint64], split: Split) -> npt.NDArray[np.bool_]:
    """Whether each row is held out, bool (rows,).

    Rows with one digest are one text: all of them are held out, or none. Of the texts, those with the smallest digests
    are: a row that is added later moves no other row from one part to the other, but at the edge.

    Args:
        digests: of the rows' texts, uint64 (rows,), as good as random.

    Raises ``DataError`` where a share is asked for and there are no two different texts.
    """
    count = len(digests)
    wanted = _wanted(count, split)
    chosen = np.zeros(count, np.bool_)
    if not wanted:
        return chosen
    texts, text_of, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    if len(texts) < 2:
        if split == "auto":
            return chosen
        raise DataError(
            "a held-out part needs at least two different rows; give more of them, or --eval data of its own, or "
            "--hold-out 0 without --keep best, --patience and --eval-every"
        )
    # Of texts that stand there many times, one may be more than what is wanted: it is passed over.
    is_held, taken = np.zeros(len(texts), np.bool_), 0
    for index, size in enumerate(sizes.tolist()):
        if taken + size <= wanted:
            is_held[index] = True
            taken += size
        if taken == wanted:
            break
    if not taken:
        is_held[int(np.argmin(sizes))] = True
    return np.asarray(is_held[text_of.reshape(-1)])


def _wanted(count: int, split: Split) -> int:
    if split == "auto":
        return min(MOST_AUTO, max(1, round(AUTO_SHARE * count))) if count >= FEWEST_AUTO else 0
    return min(count - 1, max(1, round(split * count))) if split and count > 1 else int(split > 0)
