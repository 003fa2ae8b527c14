"""Nearest neighbour: a row that crossed is taken for the token whose embedding is closest to it."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.ends import find_embedding

_ROWS_AT_ONCE: Final = 1024
_VOCABULARY_AT_ONCE: Final = 16384  # with the rows above 64 MiB of scores in float32


class Guess(NamedTuple):
    """Tokens for rows, the closest first.

    Attributes:
        ids: int64 (rows, count); distances: float32 (rows, count), Euclidean.
    """

    ids: Tensor
    distances: Tensor


def nearest_tokens(hidden: Tensor, table: Tensor) -> Tensor:
    """The closest token of each row, int64 (rows,); arguments as of ``nearest``."""
    return nearest(hidden, table, 1).ids[:, 0]


@torch.no_grad()
def nearest(hidden: Tensor, table: Tensor, count: int) -> Guess:
    """The ``count`` closest tokens of each row, or all tokens where there are not as many.

    All is computed in float32 and in pieces, so that memory stays bounded whatever the vocabulary's size.

    Args:
        hidden: (rows, embedding_size), any floating dtype.
        table: (vocabulary, embedding_size), any floating dtype, on the same device.
    """
    count = min(count, len(table))
    rows = hidden.float()
    # Where all embeddings share a large offset, differences would drown in rounding: take it away from both.
    offset = table.mean(0, dtype=torch.float32)
    best_ids = torch.zeros(len(rows), 0, dtype=torch.int64, device=rows.device)
    best_scores = rows.new_zeros(len(rows), 0)
    for first in range(0, len(table), _VOCABULARY_AT_ONCE):
        tokens = table[first : first + _VOCABULARY_AT_ONCE].float() - offset  # (piece, embedding_size)
        scores, ids = _closest_of_piece(rows - offset, tokens, count)
        best_scores = torch.cat([best_scores, scores], 1)
        best_ids = torch.cat([best_ids, ids + first], 1)
        best_scores, order = best_scores.topk(min(count, best_scores.shape[1]), largest=False)
        best_ids = best_ids.gather(1, order)
    return Guess(best_ids, _distances(rows, table, best_ids))


def _closest_of_piece(rows: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scores float32 and places in ``tokens`` int64, both (rows, at most count)."""
    # |row - token|^2 without |row|^2, which is the same for all tokens.
    squares = tokens.square().sum(1)
    found = [
        torch.addmm(squares, piece, tokens.T, alpha=-2).topk(min(count, len(tokens)), largest=False)
        for piece in rows.split(_ROWS_AT_ONCE)
    ]
    return torch.cat([scores for scores, _ in found]), torch.cat([places for _, places in found])


def _distances(rows: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """From the differences themselves: exact where a row is an embedding, as the scores are not."""
    pieces = [
        torch.linalg.vector_norm(row - table[chosen].float(), dim=1) for row, chosen in zip(rows, ids, strict=True)
    ]
    return torch.stack(pieces) if pieces else rows.new_zeros(0, ids.shape[1])


def embedding_table(base: BaseModel) -> Tensor:
    """All tokens as they go into the blocks: (vocabulary, embedding_size), in the model's dtype and on its device."""
    end = find_embedding(base)
    return (end.weight * end.scale).to(base.device, base.dtype)
