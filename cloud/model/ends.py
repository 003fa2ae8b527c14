"""The two ends of a base model that live on the device: the token embedding and the LM head.

What a family does there is read from its modules and its config, and then believed only if it gives the whole
model's logits: at export, and when a server starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from dlora.protocol.errors import ExportError

from .widening import multiply_by_slabs, weight_as_loaded

if TYPE_CHECKING:
    from .base_model import BaseModel

# Whole and cut model run the same operations; in half precision an end may round once more than the family does.
CUT_TOLERANCES: Final = {torch.float32: 1e-5}
HALF_PRECISION_TOLERANCE: Final = 5e-2
_CHECK_LENGTH = 6


@dataclass(frozen=True)
class EmbeddingEnd:
    """``weight`` (vocabulary, embedding_size); a token's embedding is its row times ``scale``."""

    weight: Tensor
    scale: float

    def __call__(self, ids: Tensor) -> Tensor:
        """int64 (…) to float32 (…, embedding_size)."""
        return self.weight[ids].float() * self.scale


@dataclass(frozen=True)
class HeadEnd:
    """``logits = cap(logit_scale * (h W^T + bias))``, ``cap(x) = softcap * tanh(x / softcap)``.

    Attributes:
        weight: (vocabulary, hidden_size); bias: (vocabulary,).
        tied: whether the weight is the embedding's.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    tied: bool

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """(…, hidden_size) to logits (…, vocabulary)."""
        return self.logits(multiply_by_slabs(hidden_states, self.weight))

    def logits(self, products: Tensor) -> Tensor:
        """From ``h W^T`` to logits, both (…, vocabulary)."""
        logits = products
        if self.bias is not None:
            logits = logits + self.bias
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def find_embedding(base: BaseModel) -> EmbeddingEnd:
    """The token embedding; its module's own ``embed_scale`` (Gemma) is the scale, as it was before half precision."""
    module = base.token_embedding
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
    return EmbeddingEnd(module.weight.detach(), float(scale))


def find_head(base: BaseModel) -> HeadEnd:
    """The LM head: Cohere multiplies logits by ``logit_scale``, Granite divides by ``logits_scaling``, Gemma caps."""
    config = base.model.config.get_text_config(decoder=True)
    module = base.lm_head
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    weight = weight_as_loaded(module)
    return HeadEnd(
        weight=weight.detach(),
        bias=None if module.bias is None else module.bias.detach(),
        logit_scale=scale,
        softcap=None if softcap is None else float(softcap),
        tied=weight is weight_as_loaded(base.token_embedding),
    )


def check_cut(base: BaseModel, embedding: EmbeddingEnd, head: HeadEnd) -> float:
    """Largest difference of the cut model's logits from the whole model's, relative to the largest logit.

    Two sequences are run, one of them padded. Raises ``ExportError`` where it is above what ``CUT_TOLERANCES`` allows
    for the base's dtype.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.vocabulary_size, (2, _CHECK_LENGTH), generator=generator).to(base.device)
    mask = torch.ones_like(ids)
    mask[1, _CHECK_LENGTH // 2 :] = 0
    with torch.no_grad():
        whole = base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        cut = head(base.last_hidden_state(embedding(ids).to(base.dtype), mask))[mask.bool()]
    error = float((cut - whole).abs().max() / whole.abs().max().clamp_min(1e-30))
    if not error <= CUT_TOLERANCES.get(base.dtype, HALF_PRECISION_TOLERANCE):
        raise ExportError(
            f"{base.name}: {base.architecture} does more between token ids and logits than dlora knows of "
            f"(its logits differ by {error:.1e}); the architecture is not supported"
        )
    return error
