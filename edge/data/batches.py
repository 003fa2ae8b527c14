"""Which examples make up which step: a function of (seed, step) and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlora.edge.seeds import Seed, order_generator
from dlora.protocol.counting import cut_to_fit
from dlora.protocol.tensors import IntArray

from .examples import Dataset, Example


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences exchanged at once, packed end to end without padding.

    Attributes:
        ids: int64 (tokens,).
        sequence_lengths: int32 (sequences,), their sum is tokens.
        label_positions: int32 (labels,), ascending rows of the packed order whose next token is a label.
        labels: int64 (labels,), those next tokens.
        crossing_positions: int32 (rows,), ascending rows at which adapters act; None: all.
    """

    ids: npt.NDArray[np.int64]
    sequence_lengths: IntArray
    label_positions: IntArray
    labels: npt.NDArray[np.int64]
    crossing_positions: IntArray | None = None

    def texts(self) -> list[npt.NDArray[np.int64]]:
        """Each sequence's tokens, (tokens,)."""
        return np.split(self.ids, np.cumsum(self.sequence_lengths)[:-1])

    def rows_of_texts(self) -> list[int]:
        """At how many rows of each sequence adapters act."""
        ends = np.cumsum(self.sequence_lengths)
        until = ends if self.crossing_positions is None else np.searchsorted(self.crossing_positions, ends)
        counts: list[int] = np.diff(until, prepend=0).tolist()
        return counts

    def cut(self, *, max_tokens: int, packs: bool) -> list[MicroBatch]:
        """This micro-batch as few that count as ``max_tokens`` at most each, in order; itself where it fits.

        A sequence that is too long by itself stays as it is. Losses and gradients of the parts add up to the whole's.
        """
        pieces = cut_to_fit(self.sequence_lengths.tolist(), max_tokens=max_tokens, packs=packs)
        if len(pieces) <= 1:
            return [self]
        ends = np.cumsum(self.sequence_lengths, dtype=np.int64)
        parts = []
        for piece in pieces:
            first, end = int(ends[piece.start] - self.sequence_lengths[piece.start]), int(ends[piece.stop - 1])
            labels = slice(*np.searchsorted(self.label_positions, [first, end]).tolist())
            crossing = self.crossing_positions
            if crossing is not None:
                crossing = crossing[slice(*np.searchsorted(crossing, [first, end]).tolist())] - np.int32(first)
            parts.append(
                MicroBatch(
                    ids=self.ids[first:end],
                    sequence_lengths=self.sequence_lengths[piece.start : piece.stop],
                    label_positions=(self.label_positions[labels] - first).astype(np.int32, copy=False),
                    labels=self.labels[labels],
                    crossing_positions=crossing,
                )
            )
        return parts

    def until_last_label(self) -> MicroBatch:
        """Each sequence as far as its last label needs it, and at least one token: what comes after has no effect."""
        ends = np.cumsum(self.sequence_lengths, dtype=np.int64)
        starts = ends - self.sequence_lengths
        last = np.searchsorted(self.label_positions, ends) - 1  # of each sequence its last label, or one before it
        needed = np.where(last >= 0, self.label_positions[np.maximum(last, 0)], -1)
        lengths = (np.maximum(needed, starts) + 1 - starts).astype(np.int32)
        kept = np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])
        crossing = self.crossing_positions
        if crossing is not None:
            assert np.isin(crossing, kept).all(), "adapters act after a last label"
            crossing = np.searchsorted(kept, crossing).astype(np.int32)
        return MicroBatch(
            ids=self.ids[kept],
            sequence_lengths=lengths,
            label_positions=np.searchsorted(kept, self.label_positions).astype(np.int32),
            labels=self.labels,
            crossing_positions=crossing,
        )


def steps_an_epoch(examples: int, examples_a_step: int) -> int:
    """Steps that one pass over so many examples takes; the last may be smaller."""
    return -(-examples // examples_a_step)


class Batches:
    """The micro-batches of every step of a run.

    Each epoch is a fresh permutation; its last micro-batch and last step may be smaller, none is dropped.

    Args:
        batch_size: sequences of a micro-batch; grad_accum: micro-batches of a step.
    """

    def __init__(self, dataset: Dataset, batch_size: int, grad_accum: int, seed: Seed) -> None:
        if batch_size < 1 or grad_accum < 1:
            raise ValueError("batch_size and grad_accum must be at least 1")
        self._dataset = dataset
        self._batch_size = batch_size
        self._sequences_per_step = batch_size * grad_accum
        self._seed = seed
        self._permutation: tuple[int, npt.NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return steps_an_epoch(len(self._dataset), self._sequences_per_step)

    @property
    def examples(self) -> int:
        """Of the data set."""
        return len(self._dataset)

    @property
    def max_sequence_length(self) -> int:
        """Tokens of the longest example."""
        return int(self._dataset.lengths.max())

    def step_indices(self, step: int) -> npt.NDArray[np.int64]:
        """The examples of a step, counted from 0, in order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self._sequences_per_step
        return self._epoch(epoch)[start : start + self._sequences_per_step]

    def step_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, counted from 0."""
        indices = self.step_indices(step)
        return [
            pack([self._dataset[int(index)] for index in indices[start : start + self._batch_size]])
            for start in range(0, len(indices), self._batch_size)
        ]

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._permutation is None or self._permutation[0] != epoch:
            drawn = order_generator(self._seed, epoch).permutation(len(self._dataset))
            self._permutation = (epoch, drawn.astype(np.int64, copy=False))
        return self._permutation[1]


def evaluation_batches(dataset: Dataset, batch_size: int) -> Iterator[MicroBatch]:
    """The whole data set once, in its own order."""
    for start in range(0, len(dataset), batch_size):
        yield pack([dataset[index] for index in range(start, min(start + batch_size, len(dataset)))])


def pack(examples: Sequence[Example]) -> MicroBatch:
    """Lay sequences end to end; at least one."""
    lengths = np.array([len(example.ids) for example in examples], np.int32)
    starts = np.cumsum(lengths, dtype=np.int32) - lengths
    return MicroBatch(
        ids=np.concatenate([example.ids for example in examples]).astype(np.int64),
        sequence_lengths=lengths,
        label_positions=np.concatenate(
            [example.label_positions + start for example, start in zip(examples, starts, strict=True)]
        ).astype(np.int32, copy=False),
        labels=np.concatenate([example.labels for example in examples]),
        crossing_positions=_crossing_positions(examples, starts),
    )


def _crossing_positions(examples: Sequence[Example], starts: IntArray) -> IntArray | None:
    if all(example.acts_from is None for example in examples):
        return None
    rows = [start + np.array(example.crossing_rows) for example, start in zip(examples, starts, strict=True)]
    return np.concatenate(rows).astype(np.int32)
