"""A block that goes on from tokens before its own: what it keeps of them, and how it is called with that.

Decoders hand their blocks a cache, which takes the keys and values of new tokens and gives those of all. A device has
arrays: so a block is handed a stand-in, whose past goes in with the tokens, and whose new keys and values come out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache

from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.parts import CACHE_ARGUMENTS

from .calls import MASK, BlockCall, CannotRunOnDevice, attention, config_of, random_embeds, recorded

PAST_MASK: Final = "past_mask"
PAST_KEYS: Final = "past_keys"
PAST_VALUES: Final = "past_values"
KEYS: Final = "keys"
VALUES: Final = "values"


class Past:
    """Stands for a decoder's cache in one block.

    Args:
        keys, values: of the tokens before, (past, heads, width) each; None: there are none.

    Attributes:
        new: once the block has run, keys and values of its own tokens, likewise.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self.new: tuple[Tensor, Tensor] | None = None
        self._past = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As a cache of transformers has it: (1, heads, tokens, width) each, of the new tokens and then of all."""
        if self.new is not None:
            raise CannotRunOnDevice("its attention takes keys and values more than once")
        if any(states.ndim != 4 or states.shape[0] != 1 for states in (key_states, value_states)):
            raise CannotRunOnDevice("its keys and values are not of the usual shape")
        self.new = _by_token(key_states), _by_token(value_states)
        pairs = zip(self._past, self.new, strict=True)
        whole = (new if before is None else torch.cat([before, new]) for before, new in pairs)
        keys, values = (each.transpose(0, 1).unsqueeze(0) for each in whole)
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """How many tokens came before."""
        keys, _values = self._past
        return 0 if keys is None else keys.shape[0]


def _by_token(states: Tensor) -> Tensor:
    return states.squeeze(0).transpose(0, 1)


def cache_arguments(base: BaseModel) -> tuple[str, ...]:
    """By which argument each block is handed a cache of keys and values; empty: by none."""
    known = inspect.signature(base.decoder.forward).parameters
    argument = next((name for name in CACHE_ARGUMENTS if name in known), "")
    if not argument:
        return ("",) * base.blocks
    cache = DynamicCache()
    with recorded(base) as (calls, _), torch.no_grad(), attention(config_of(base), eager=True):
        base.decoder(inputs_embeds=random_embeds(base, 3), use_cache=True, **{argument: cache})
    return tuple(next((name for name, value in given.items() if value is cache), "") for given in calls)


def call_with_past(
    call: BlockCall, argument: str, x: Tensor, context: Mapping[str, Tensor], past: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (tokens, width) after a block of those before it, and the tokens' keys and values.

    Args:
        argument: of ``cache_arguments``.
        context: as ``BlockCall`` takes it; beside ``mask`` of these tokens ``past_mask``, for those of ``past``.
        past: their keys and values.

    Raises ``CannotRunOnDevice`` where the block does not use a cache as it is used here.
    """
    stand_in = Past(*(past or ()))
    named = dict(context)
    past_mask = named.pop(PAST_MASK, None)
    if past_mask is not None:
        named[MASK] = torch.cat([past_mask, named[MASK]], -1)
    y = call(x, named, **{argument: stand_in})
    if stand_in.new is None:
        raise CannotRunOnDevice("its attention takes no keys and values of tokens before")
    return y, *stand_in.new
