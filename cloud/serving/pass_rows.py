"""Which rows of a micro-batch run in passes, where the base model's blocks can be run at some rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dlora.cloud.model.row_blocks import DividedTexts
from dlora.protocol import messages as m


@dataclass(frozen=True)
class PassRows:
    """Tokens by what becomes of them. All int64; a number is a token's place among those of the micro-batch.

    Attributes:
        base: those that run in the base pass: of each text all up to the last one that is wanted, at which adapters act
            or whose last hidden state the device asked for. What comes after it changes nothing.
        last: those that run in each pass: of each text from the first one that is wanted.
        texts: the first ones, so divided.
        acting: at which adapters act; labelled: whose last hidden state the device asked for.
    """

    base: Tensor
    last: Tensor
    texts: DividedTexts
    acting: Tensor
    labelled: Tensor

    @classmethod
    def of(cls, begun: m.Embeddings) -> PassRows:
        """Of a micro-batch."""
        lengths = begun.sequence_lengths.data.astype(np.int64)
        ends = lengths.cumsum()
        starts = ends - lengths
        labelled = torch.from_numpy(begun.label_positions.data).long()
        if begun.crossing_positions is None:
            every = torch.arange(int(ends[-1]))
            return cls(every, every, DividedTexts(tuple(lengths.tolist()), (0,) * len(lengths)), every, labelled)
        acting = begun.crossing_positions.data
        wanted = np.union1d(acting, begun.label_positions.data)
        begin, end = np.searchsorted(wanted, starts), np.searchsorted(wanted, ends)
        is_wanted = end > begin
        # Of a text of which nothing is wanted, its first token: no text is empty.
        first = np.where(is_wanted, wanted[np.minimum(begin, len(wanted) - 1)], starts)
        last = np.where(is_wanted, wanted[end - 1], starts) + 1
        texts = DividedTexts(tuple((last - starts).tolist()), tuple((first - starts).tolist()))
        return cls(_ranges(starts, last), _ranges(first, last), texts, torch.from_numpy(acting).long(), labelled)

    @property
    def acting_in_base(self) -> Tensor:
        """Where the acting ones lie among those of the base pass."""
        return torch.searchsorted(self.base, self.acting)

    @property
    def acting_in_last(self) -> Tensor | None:
        """The same among those of each pass; None: they are all of them."""
        return None if len(self.acting) == len(self.last) else torch.searchsorted(self.last, self.acting)

    @property
    def labels_in_last(self) -> Tensor:
        """Where the labelled ones lie among those of each pass."""
        return torch.searchsorted(self.last, self.labelled)


def _ranges(begins: np.ndarray, ends: np.ndarray) -> Tensor:
    return torch.cat([torch.arange(begin, end) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)])
