"""What a device would send under a defence, and what the defence costs: made from tokens, as the device has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.ends import find_embedding, find_head
from dlora.cloud.model.parts import ModelParts

from .ridge_probe import run_blocks


def embeddings_of(base: BaseModel, ids: Tensor) -> Tensor:
    """int64 (tokens,) to what crosses without a defence: (tokens, embedding_size) in the model's dtype."""
    return find_embedding(base)(ids.to(base.device)).to(base.dtype)


def with_noise(hidden: Tensor, times_rms: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise whose standard deviation is ``times_rms`` times the root mean square of ``hidden``.

    Args:
        hidden: any shape and floating dtype, which the result has too.
        generator: on the CPU.
    """
    deviation = times_rms * hidden.float().square().mean().sqrt()
    noise = torch.randn(hidden.shape, generator=generator).to(hidden.device)
    return (hidden.float() + deviation * noise).to(hidden.dtype)


@torch.no_grad()
def after_blocks(parts: ModelParts, ids: Tensor, lengths: Sequence[int], blocks: int) -> Tensor:
    """What crosses where the device holds the first ``blocks`` blocks: float32 (tokens, width), or the embeddings where
    it holds none. ``ids``: int64 (tokens,), the sequences one after another; each is run by itself."""
    embeddings = embeddings_of(parts.base, ids)
    if blocks == 0:
        return embeddings.float()
    return torch.cat([run_blocks(parts, rows[None], blocks)[0] for rows in embeddings.split(list(lengths))])


@torch.no_grad()
def loss_with(
    parts: ModelParts, hidden: Tensor, lengths: Sequence[int], label_positions: Tensor, labels: Tensor, blocks: int
) -> float:
    """Mean cross-entropy where the rest of the model runs on these hidden states, each sequence by itself.

    Args:
        hidden: (tokens, width), the sequences one after another, after the first ``blocks`` blocks.
        label_positions: int64 (labels,), rows of ``hidden``; labels: int64 (labels,), what should be predicted there.
    """
    base = parts.base
    given = hidden.to(base.device, base.dtype)
    last = torch.cat([parts.run(rows[None], begin=blocks)[0] for rows in given.split(list(lengths))])
    logits = find_head(base)(last[label_positions.to(base.device)]).float()
    return float(functional.cross_entropy(logits, labels.to(base.device)))
