"""Tokens of several contexts through the same blocks at once: what a block multiplies, it multiplies once.

::

    context 1   k k k k t        the tokens t lie side by side; keys and values k stay where each context has them
    context 2   k k t t t        attention takes each context by itself, as it would if it were alone

No model-specific code: the family's own decoder runs, which is told each token's position and sees a cache that keeps
nothing. It is tried once against each context alone; a family whose attention is not ``scaled_dot_product_attention``,
or that needs something else of the tokens before, is not run so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from dlora.protocol.errors import ExportError

from .base_model import BaseModel
from .cache import PartCache
from .layout import is_near, random_embeds
from .part_forward import PartForward, few_rows_in_one_thread
from .parts import ModelParts

logger = logging.getLogger("dlora.cloud")

_TRIED: Final = ((5, 1), (0, 4), (3, 1), (4, 3))
"""What every model is tried with: tokens that a context holds, and how many go on."""
_WINDOWS: Final = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
)
"""What configs call the tokens that attention reaches back."""
_ORIGINAL_LENGTH: Final = "original_max_position_embeddings"  # past which "longrope" turns all positions otherwise


class SideBySide:
    """Runs tokens of several contexts side by side, in several threads at once.

    Make one for a model: it is tried once, on a few tokens.

    Attributes:
        most_tokens: of a context that can be run so.
    """

    def __init__(self, parts: ModelParts) -> None:
        self._parts = parts
        self.most_tokens = _reach(parts.base)

    @classmethod
    def of(cls, parts: ModelParts | None) -> SideBySide | None:
        """None where the model cannot be run so."""
        if parts is None:
            return None
        found, base = cls(parts), parts.base
        try:
            parts.check_cache()
            with torch.no_grad():
                if found._try():
                    return found
        except Exception as error:  # whatever a family does with what it does not know
            logger.debug("%s does not run contexts side by side: %s", base.name, error)
        return None

    def run(self, forwards: Sequence[PartForward]) -> list[Tensor]:
        """What each gives alone, of the same blocks of the model. Under ``torch.no_grad``."""
        parts, begin, end = self._parts, forwards[0].begin, forwards[0].end
        caches, counts = [each.cache for each in forwards], [each.tokens for each in forwards]
        hidden_states = torch.cat([each.hidden_states for each in forwards], 1)
        starts = [cache.length for cache in caches]
        positions = [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
        held = _ContextCaches(caches, counts)
        with (
            parts.extending(caches, counts, begin, end),
            few_rows_in_one_thread(parts, sum(counts)),
            _ContextAttention(held) as attention,
        ):
            position_ids = torch.cat(positions)[None].to(hidden_states.device)
            found = parts.run_side_by_side(hidden_states, begin, end, position_ids, held)
            if not attention.has_run:
                raise ExportError("its attention is not scaled_dot_product_attention")
        return list(found.split(counts, 1))

    def _try(self) -> bool:
        """Whether all tokens give what they give alone, in either half of the blocks."""
        base = self._parts.base
        middle = max(1, base.blocks // 2)
        states = [random_embeds(base, sum(each)).roll(index, 1) for index, each in enumerate(_TRIED)]
        for begin, end in ((0, middle), (middle, None)):
            alone = [self._begin(each, begin, end, past) for each, (past, _) in zip(states, _TRIED, strict=True)]
            beside = [self._begin(each, begin, end, past)[1] for each, (past, _) in zip(states, _TRIED, strict=True)]
            wanted = [forward.run() for _, forward in alone]
            if not all(map(is_near, self.run(beside), wanted)):
                return False
            states = [torch.cat([*first, last], 1) for (first, _), last in zip(alone, wanted, strict=True)]
        return True

    def _begin(self, states: Tensor, begin: int, end: int | None, past: int) -> tuple[list[Tensor], PartForward]:
        """What the first tokens of a context give, if there are any, and the others that go on."""
        cache = self._parts.new_cache(begin=begin, end=end)
        first = [self._parts.run(states[:, :past], begin=begin, end=end, cache=cache)] if past else []
        return first, PartForward(self._parts, states[:, past:], begin, end, cache)


def _reach(base: BaseModel) -> int:
    """How many tokens a context may have for attention to take in all of them alike."""
    config = base.model.config.get_text_config(decoder=True)
    limits = [getattr(config, name, None) for name in _WINDOWS]
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
        limits.append(rope.get(_ORIGINAL_LENGTH) or getattr(config, _ORIGINAL_LENGTH, None))
    return min([base.max_sequence_length, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])


class _ContextCaches(DynamicCache):
    """What a decoder sees as an empty cache: each context's tokens go into its own.

    Attributes:
        keys_and_values: of the block that has just asked, of each context.
    """

    def __init__(self, caches: Sequence[PartCache], counts: Sequence[int]) -> None:
        super().__init__()
        self.counts = list(counts)
        self.keys_and_values: list[tuple[Tensor, Tensor]] = []
        self._held = [cache.decoder_cache for cache in caches]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: for the decoder all tokens are the first ones, at the positions that it is told. A block that asks makes
        something else of it."""
        if self.keys_and_values:
            raise ExportError("its blocks ask how many tokens there were")
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """What is given back is only what came: attention takes ``keys_and_values``."""
        each = zip(self._held, key_states.split(self.counts, -2), value_states.split(self.counts, -2), strict=True)
        self.keys_and_values = [held.update(keys, values, layer_idx) for held, keys, values in each]
        return key_states, value_states


class _ContextAttention(TorchFunctionMode):
    """While it is entered, in this thread, the tokens of each context attend to all that their own cache holds."""

    def __init__(self, caches: _ContextCaches) -> None:
        super().__init__()
        self._caches = caches
        self.has_run = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        return self._attend(*args, **given) if func is scaled_dot_product_attention else func(*args, **given)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None:
            raise ExportError("its attention is told more than which token comes before which")
        self.has_run = True
        queries = query.split(self._caches.counts, -2)
        each = zip(queries, self._caches.keys_and_values, strict=True)
        return torch.cat([_attend(part, *held, scale) for part, held in each], -2)


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """Of tokens that go on in one context: what transformers' ``sdpa_attention_forward`` gives for these, to the bit
    where heads have 256 numbers at most."""
    tokens, length = query.shape[-2], keys.shape[-2]
    mask = None
    if 1 < tokens < length:
        mask = torch.ones(1, 1, tokens, length, dtype=torch.bool, device=query.device).tril(length - tokens)
    is_causal, is_grouped = tokens == length > 1, query.shape[1] > keys.shape[1]
    return scaled_dot_product_attention(
        query, keys, values, mask, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
    )
