"""Ridge probe: a linear map brings hidden states from after the first blocks back to embeddings.

It is fitted on random tokens that the attacker runs through the public blocks, so it needs nothing of the device's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from dlora.cloud.audit.nearest_neighbour import embedding_table, nearest
from dlora.cloud.model.parts import ModelParts

_TOKENS: Final = 32768  # random ones, on which it is fitted: many times the width
_LENGTH: Final = 16  # of a random sequence
_SEQUENCES_AT_ONCE: Final = 64
_FREQUENT: Final = 0.5  # share of the random tokens that is drawn as text draws them, and not each alike
# Relative to the mean square of a feature (1, as they are standardised): it keeps down features that say the same.
_RIDGE: Final = 1e-4
# A few values are hundreds of times the others (massive activations, mostly at a sequence's first token). They would
# decide all of the fit: standardised values are cut off here.
_LARGEST: Final = 10.0
_ROWS_FOR_SCALE: Final = 4096


@dataclass(frozen=True)
class RidgeProbe:
    """``embedding = clamp((hidden - centre) / scale) @ matrix + offset``.

    Attributes:
        table: (vocabulary, embedding_size), the embeddings among which it looks.
        centre, scale: float32 (width,); matrix: float32 (width, embedding_size); offset: float32 (embedding_size,).
    """

    table: Tensor
    centre: Tensor
    scale: Tensor
    matrix: Tensor
    offset: Tensor

    @classmethod
    def fit(cls, parts: ModelParts, blocks: int) -> Self:
        """Fit it for hidden states from after the first ``blocks`` blocks, 1 or more."""
        table = embedding_table(parts.base)
        ids = _random_ids(len(table)).to(table.device)
        hidden = [parts.run(table[piece], end=blocks).float() for piece in ids.split(_SEQUENCES_AT_ONCE)]
        features, wanted = torch.cat(hidden).flatten(0, 1), table[ids].flatten(0, 1).float()
        # The middle 68 %: massive activations move it as little as they do the median.
        ordered = features[:: max(1, len(features) // _ROWS_FOR_SCALE)].sort(0).values
        low, centre, high = (ordered[int(share * len(ordered))] for share in (0.16, 0.5, 0.84))
        scale = ((high - low) / 2).clamp_min(1e-6)
        matrix, offset = _solve(_standardise(features, centre, scale), wanted)
        return cls(table, centre, scale, matrix, offset)

    def embeddings(self, hidden: Tensor) -> Tensor:
        """(rows, width) to float32 (rows, embedding_size)."""
        return _standardise(hidden.float(), self.centre, self.scale) @ self.matrix + self.offset

    def limit(self, hidden: Tensor) -> Tensor:
        """Hidden states (rows, width) as float32, without massive activations: the values that the fit has cut off."""
        room = _LARGEST * self.scale
        return hidden.float().clamp(self.centre - room, self.centre + room)

    def shortlist(self, hidden: Tensor, count: int) -> Tensor:
        """(rows, width) to the ``count`` nearest tokens of each row, the nearest first: int64 (rows, count)."""
        return nearest(self.embeddings(hidden), self.table, count).ids


def _random_ids(vocabulary: int) -> Tensor:
    """int64 (sequences, length).

    Vocabularies made by merging pairs have the frequent tokens first. So half of the tokens is drawn with a probability
    of about 1 / id: on uniform ones alone the probe is blind for the words that texts are made of.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (_TOKENS // _LENGTH, _LENGTH)
    alike = torch.randint(vocabulary, shape, generator=generator)
    frequent = torch.pow(float(vocabulary), torch.rand(shape, generator=generator)).long() - 1
    return torch.where(torch.rand(shape, generator=generator) < _FREQUENT, frequent, alike).clamp(0, vocabulary - 1)


def _standardise(hidden: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    return ((hidden - centre) / scale).clamp(-_LARGEST, _LARGEST)


def _solve(features: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix and offset of the ridge regression from features (rows, width) to wanted (rows, embedding_size)."""
    mean, target = features.mean(0), wanted.mean(0)
    centred = features - mean
    gram = (centred.T @ centred).double()
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    matrix = torch.linalg.solve(gram, (centred.T @ (wanted - target)).double()).float()
    return matrix, target - mean @ matrix
