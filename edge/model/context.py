"""The tokens of one context, and those of them that a model has seen already.

What is held, on the server and perhaps on the device, is cropped to a position and appended to. So whatever comes next,
only what is new crosses: the next token, a draft that may turn out wrong, the second turn of a chat. A server that has
lost the context, or another one, gets all of it again.
"""

from __future__ import annotations

import numpy as np

from dlora.protocol.tensors import FloatArray

from .ends import LongArray
from .extension import Extension, Guesses
from .generating import GeneratingModel
from .measured_drafts import MeasuredDrafts


class Context:
    """A context of one model. The whole prefix crosses each time where nothing is kept.

    Attributes:
        reused: how many tokens of the last call's the server held already; 0 where that was lost.
        drafts: what was measured of drafts.
    """

    def __init__(self, model: GeneratingModel) -> None:
        self.model = model
        self.reused = 0
        self.drafts = MeasuredDrafts()
        self._kept = np.zeros(0, np.int64)
        self._held_act_from = 0

    @property
    def limit(self) -> int:
        """The most tokens that it can have."""
        return self.model.context_limit

    def logits(self, ids: LongArray, acts_from: int = 0, count: int = 1) -> FloatArray:
        """Logits float32 (count, vocabulary) of the tokens that follow the last ``count`` of ``ids``; as ``extend``."""
        return self.extend(ids, acts_from, count).logits

    def extend(self, ids: LongArray, acts_from: int = 0, count: int = 1, guesses: Guesses = Guesses()) -> Extension:
        """What follows the last ``count`` of ``ids``, and what the server guesses.

        Args:
            ids: int64 (tokens,), the whole text so far, at most ``limit``.
            acts_from: the row from which on the adapters act.

        Raises what ``Connection`` raises, and ``DataError`` where a server that took over has less room.
        """
        # Keys and values differ where adapters act and where they do not.
        same = common_prefix(self._kept, ids)
        if self._held_act_from != acts_from:
            same = min(same, self._held_act_from, acts_from)
        known = min(same, len(ids) - count)
        self._kept, self._held_act_from = ids[:known], acts_from  # until the model has the rest, too
        found = self.model.extend(ids, known, acts_from, count, guesses)
        self.reused = found.held
        self._kept = np.append(ids, np.array(found.drafts, np.int64))
        return found


def common_prefix(one: LongArray, other: LongArray) -> int:
    """How many tokens both begin with alike."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter
