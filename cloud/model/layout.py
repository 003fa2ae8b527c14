"""How a micro-batch of sequences of different lengths lies in the base model's input.

*Padded* is a row a sequence, filled up to the longest; every family can do it. *Packed* is one row of all
sequences, with positions that start anew at each: nothing is computed for padding, but attention is masked over
the whole row. Which is cheaper depends on the lengths; whether a model can do the second, it is asked once. Neither
ever runs more tokens than a micro-batch may have, padding among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .base_model import BaseModel

# Rounding only. The same operations on the same shapes are mostly equal to the bit, those of experts not everywhere.
_TOLERANCE: Final = 1e-4
_TOLERANCE_OF_HALF: Final = 5e-2


@dataclass(frozen=True)
class Layout:
    """Inputs of ``BaseModel.last_hidden_state``.

    Attributes:
        rows: int64 (tokens,), where each token lies in the flattened input; None where they lie as they came.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    rows: Tensor | None


def lay_out(tokens: Tensor, lengths: Tensor, *, may_pack: bool, max_tokens: int) -> Layout:
    """Lay out embeddings (tokens, embedding_size) of sequences of ``lengths``, int64 (sequences,) on the CPU.

    Where the model may pack, the input never has more tokens than ``max_tokens``, padding among them. Where it may not,
    the session has refused what would (``counting.py``).
    """
    longest = int(lengths.max())
    if int(lengths.min()) == longest:
        return Layout(tokens.view(len(lengths), longest, -1), None, None, None)
    if may_pack:
        padded_tokens, packed_tokens, width = len(lengths) * longest, len(tokens), tokens.shape[-1]
        is_cheaper = _cost(packed_tokens, packed_tokens, width) < _cost(padded_tokens, longest, width)
        if padded_tokens > max_tokens or is_cheaper:
            return _pack(tokens, lengths)
    return _pad(tokens, lengths)


def can_pack(base: BaseModel) -> bool:
    """Whether the base model keeps packed sequences apart: whether it gives them what it gives padded ones.

    Where attention chooses its tokens, it chooses among those of all packed sequences. That shows only in rows of more
    tokens than it chooses, 2048 in DeepSeek V3.2, so that it is not tried.
    """
    if base.choosing:
        return False
    lengths, tokens = torch.tensor([3, 5, 2]), random_embeds(base, 10)[0]
    padded, packed = _pad(tokens, lengths), _pack(tokens, lengths)
    with torch.no_grad():
        wanted = _run(base, padded).reshape(-1, base.hidden_size)[padded.rows]
        try:
            found = _run(base, packed).reshape(-1, base.hidden_size)
        except Exception:  # whatever a family does with positions that it does not know
            return False
    return is_near(found, wanted)


def random_embeds(base: BaseModel, length: int) -> Tensor:
    """(1, length, embedding_size), as large as the model's own; the same each time."""
    spread = float(base.token_embedding.weight.float().std())
    embeds = torch.randn(1, length, base.embedding_size, generator=torch.Generator().manual_seed(0)) * spread
    return embeds.to(base.device, base.dtype)


def is_near(found: Tensor, wanted: Tensor) -> bool:
    """Whether they differ by rounding only, as the same sums in another order do."""
    tolerance = _TOLERANCE if wanted.dtype in (torch.float32, torch.float64) else _TOLERANCE_OF_HALF
    return bool((found.float() - wanted.float()).abs().max() <= tolerance * wanted.float().abs().max())


def _run(base: BaseModel, layout: Layout) -> Tensor:
    return base.last_hidden_state(layout.inputs_embeds, layout.attention_mask, layout.position_ids)


def _pack(tokens: Tensor, lengths: Tensor) -> Layout:
    starts = torch.cumsum(lengths, 0) - lengths
    positions = torch.arange(int(lengths.sum())) - torch.repeat_interleave(starts, lengths)
    return Layout(tokens[None], None, positions[None].to(tokens.device), None)


def _pad(tokens: Tensor, lengths: Tensor) -> Layout:
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]  # (batch, length)
    rows = mask.view(-1).nonzero().view(-1).to(tokens.device)
    padded = tokens.new_zeros(len(lengths) * longest, tokens.shape[-1])
    padded.index_copy_(0, rows, tokens)
    return Layout(padded.view(len(lengths), longest, -1), mask.long().to(tokens.device), None, rows)


def _cost(tokens: int, span: int, width: int) -> float:
    # A block's products take about 12 * width**2 multiplications a token, its attention 2 * width a token seen.
    return tokens * (12.0 * width + 2.0 * span)
