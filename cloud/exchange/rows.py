"""Some rows of a flattened padded batch, and where they lie in it."""

from __future__ import annotations

import torch
from torch import Tensor


def chosen_rows(padded: Tensor, rows: Tensor | None) -> Tensor:
    """(batch, length, width) or (batch * length, width) to the ``rows``, int64, of it, (rows, width); None: all."""
    flat = padded.reshape(-1, padded.shape[-1])
    return flat if rows is None else flat.index_select(0, rows)


def among_all(packed: Tensor, rows: Tensor | None, shape: torch.Size) -> Tensor:
    """(rows, width) to ``shape``, with zeros for all other rows."""
    if rows is None:
        return packed.view(shape)
    full = torch.zeros(shape, dtype=packed.dtype, device=packed.device)
    full.view(-1, shape[-1]).index_copy_(0, rows, packed)
    return full
