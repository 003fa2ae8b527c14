"""Which tokens see which: what blocks on the device add to the scores of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from dlora.protocol.tensors import FloatArray, IntArray

from .block_weights import BLOCKED


@dataclass(frozen=True)
class Rows:
    """Tokens of several texts.

    Attributes:
        texts: which text each is of; places: where in it. Integers (tokens,) both.
    """

    texts: IntArray
    places: IntArray

    @classmethod
    def of(cls, lengths: IntArray) -> Self:
        """All tokens of texts of ``lengths``, one text after the other."""
        places = np.concatenate([np.arange(length) for length in lengths])
        return cls(np.repeat(np.arange(len(lengths)), lengths), places)

    def only(self, which: Any) -> Self:
        """Some of them: a mask, indices, or a slice."""
        return type(self)(self.texts[which], self.places[which])

    def __len__(self) -> int:
        """How many tokens."""
        return len(self.texts)


def attention_mask(rows: Rows, seen: Rows, window: int | None) -> FloatArray:
    """float32 (1, 1, rows, seen), to be added to scores: 0 where a row's token sees a column's, which is of its own
    text, not after it, and fewer than ``window`` tokens before it."""
    back = rows.places[:, None] - seen.places[None, :]
    sees = (rows.texts[:, None] == seen.texts[None, :]) & (back >= 0)
    if window is not None:
        sees &= back < window
    return np.where(sees, np.float32(0), BLOCKED)[None, None]
