"""What a loop of one's own trains on: tokens, what should follow them, and how much that counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dlora.edge.data.batches import MicroBatch, pack
from dlora.edge.data.examples import Example, last_occurrence
from dlora.protocol.errors import DataError
from dlora.protocol.tensors import FloatArray, IntArray


@dataclass(frozen=True)
class Datum:
    """One sequence.

    Args:
        tokens: token ids (tokens,), what the model reads.
        targets: token ids (tokens,), what should follow each; -100, or any other negative number, where that does not
            matter. None: the next token, and nothing after the last.
        weights: (tokens,), how much each target counts; 0: not at all. None: 1 each.

    Attributes:
        rows: the rows whose target counts, int32 (labelled,), ascending.

    Raises ``DataError`` where their lengths differ, or nothing counts.
    """

    tokens: Sequence[int] | npt.NDArray[np.integer]
    targets: Sequence[int] | npt.NDArray[np.integer] | None = None
    weights: Sequence[float] | npt.NDArray[np.floating] | None = None
    rows: IntArray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        tokens = np.asarray(self.tokens, np.int32)
        targets = np.append(tokens[1:], -1) if self.targets is None else np.asarray(self.targets, np.int64)
        counts = targets >= 0
        if self.weights is not None:
            weights = np.asarray(self.weights, np.float32)
            if weights.shape != tokens.shape or not np.isfinite(weights).all():
                raise DataError("a datum's weights must be finite numbers, one for each of its tokens")
            counts &= weights != 0
        if tokens.ndim != 1 or targets.shape != tokens.shape:
            raise DataError("a datum's targets must be as many as its tokens")
        if len(tokens) and tokens.min() < 0:
            raise DataError("a datum's tokens must be token ids")
        rows = np.flatnonzero(counts).astype(np.int32)
        if not len(rows):
            raise DataError("nothing of a datum counts: it needs a target whose weight is not 0")
        object.__setattr__(self, "rows", rows)

    @classmethod
    def of(cls, example: Example) -> Datum:
        """An example of a data set: its labels count 1 each, and nothing else."""
        targets = np.full(len(example.ids), -1, np.int64)
        targets[example.label_positions] = example.labels
        return cls(example.ids, targets)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The targets that count, int64 (labelled,)."""
        if self.targets is None:
            return np.asarray(self.tokens, np.int64)[self.rows + 1]
        return np.asarray(self.targets, np.int64)[self.rows]

    @property
    def is_plain(self) -> bool:
        """Whether each target that counts is the next token, with weight 1."""
        rows = self.rows[self.rows + 1 < len(self.tokens)]
        is_next = len(rows) == len(self.rows) and np.array_equal(self.labels, np.asarray(self.tokens)[rows + 1])
        return bool(is_next and (self.label_weights == 1).all())

    def example(self, invocation: tuple[int, ...] = ()) -> Example:
        """As data sets have them."""
        ids = np.asarray(self.tokens, np.int32)
        return Example(ids, self.rows, self.labels, last_occurrence(ids, invocation) if invocation else None)

    @property
    def label_weights(self) -> FloatArray:
        """Their weights, float32 (labelled,)."""
        if self.weights is None:
            return np.ones(len(self.rows), np.float32)
        return np.asarray(self.weights, np.float32)[self.rows]


def pack_data(data: Sequence[Datum], invocation: tuple[int, ...] = ()) -> MicroBatch:
    """Some data as one micro-batch, end to end; adapters act from the last ``invocation`` of each on, or everywhere."""
    return pack([datum.example(invocation) for datum in data])
