"""The tokens of one context, and those of them that the server holds keys and values of.

The server crops what it holds to a position and appends. So whatever comes next, only what is new crosses: the next
token, a draft that may turn out wrong, the second turn of a chat. A server that has lost the context, or another
one, gets all of it again.
"""

from __future__ import annotations

import numpy as np

from dlora.edge.data.batches import MicroBatch
from dlora.protocol import messages as m
from dlora.protocol.errors import DataError
from dlora.protocol.tensors import FloatArray

from .ends import LongArray
from .split import SplitModel


class Context:
    """A context of one model session. The whole prefix crosses each time where the server keeps nothing.

    Attributes:
        limit: the most tokens that it can have.
        reused: how many tokens of the last call's the server held already; 0 where that was lost.
    """

    def __init__(self, model: SplitModel) -> None:
        self.model = model
        self.reused = 0
        self._held = np.zeros(0, np.int64)
        self._held_act_from = 0

    @property
    def limit(self) -> int:
        return self._room or self.model.connection.welcome.max_sequence_length

    @property
    def _room(self) -> int:
        opening = self.model.connection.session.opened_with
        assert opening is not None
        assert isinstance(opening.purpose, m.Use)
        return opening.purpose.context_length

    def logits(self, ids: LongArray, acts_from: int = 0, count: int = 1) -> FloatArray:
        """Logits float32 (count, vocabulary) of the tokens that follow the last ``count`` of ``ids``.

        Args:
            ids: int64 (tokens,), the whole text so far, at most ``limit``.
            acts_from: the row from which on the adapters act.

        Raises what ``Connection`` raises, and ``DataError`` where a server that took over has less room.
        """
        return self.model.session.run(lambda: self._logits(ids, acts_from, count))

    def _logits(self, ids: LongArray, acts_from: int, count: int) -> FloatArray:
        if len(ids) > self.limit:
            raise DataError(f"the text has {len(ids)} tokens, the server has room for {self.limit}; begin anew")
        if not self._room:
            self.reused = 0
            return self.model.logits(_part(ids, 0, len(ids), acts_from, count))
        # Keys and values differ where adapters act and where they do not.
        same = common_prefix(self._held, ids[: self.model.connection.session.cached_tokens])
        if self._held_act_from != acts_from:
            same = min(same, self._held_act_from, acts_from)
        self.reused = position = min(same, len(ids) - count)
        self._held, self._held_act_from = ids, acts_from
        most = max(1, self.model.connection.welcome.max_sequence_length - count)  # the last may have these more
        ends = [*range(position + most, len(ids) - count + 1, most), len(ids)]
        starts = [position, *ends[:-1]]
        parts = [
            _part(ids, start, end, acts_from, count if end == len(ids) else 1)
            for start, end in zip(starts, ends, strict=True)
        ]
        return self.model.decode(parts, position)


def _part(ids: LongArray, start: int, end: int, acts_from: int, count: int) -> MicroBatch:
    """The tokens from ``start`` to before ``end``, with the logits after the last ``count`` of them."""
    length = end - start
    crossing = None if acts_from <= start else np.arange(min(acts_from - start, length), length, dtype=np.int32)
    return MicroBatch(
        ids=ids[start:end],
        sequence_lengths=np.array([length], np.int32),
        label_positions=np.arange(length - count, length, dtype=np.int32),
        labels=np.zeros(count, np.int64),
        crossing_positions=crossing,
    )


def common_prefix(one: LongArray, other: LongArray) -> int:
    """How many tokens both begin with alike."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter
