"""Keys and values of the tokens that a base model, or a part of it, has seen."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .base_model import BaseModel


class PartCache:
    """Keys and values of the tokens that a part of the base model has seen. Of one context, not for two threads.

    All of them are kept, in families with a sliding window too (their masks hide the older ones), so that it can be
    cropped to any length. Under ``torch.no_grad`` it keeps no graph.

    Args:
        room: for how many tokens there is room from the first one on, so that nothing is copied as more of them come;
            0: it grows with them. Only under ``torch.no_grad``.

    Attributes:
        base: the model.
        begin: the part's first block; end: the block after its last, None for the whole rest and the final norm.
        length: how many tokens it holds, in each row.
        decoder_cache: as the decoder takes it.
    """

    def __init__(self, base: BaseModel, begin: int, end: int | None, room: int = 0) -> None:
        self.begin = begin
        self.end = end
        self.length = 0
        self.base = base
        self._room = room
        self.decoder_cache = self._empty()

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that it holds."""
        return sum(self.nbytes_of_blocks)

    @property
    def nbytes_of_blocks(self) -> list[int]:
        """The same of each block that holds some."""
        return [layer.keys.nbytes + layer.values.nbytes for layer in self._filled()]

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens. Raises ``ValueError`` where it does not hold as many."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} tokens cannot be cropped to {length}")
        self.cut(length)

    def take_rows(self, other: PartCache, end: int) -> None:
        """Take the tokens from its own last one to before ``end`` from another cache of these blocks."""
        rows = slice(self.length, end)
        if self.length < end:
            layers: list[Any] = list(other.decoder_cache.layers)
            for index, layer in enumerate(layers):
                if layer.keys is not None:
                    self.decoder_cache.update(layer.keys[..., rows, :], layer.values[..., rows, :], index)
            self.length = end

    def cut(self, length: int) -> None:
        """To a length, and not by a number of tokens as ``DynamicCache.crop`` does.

        After a forward that failed some blocks have more tokens than others, and one may have keys without values.
        """
        if length == 0:
            self.decoder_cache = self._empty()  # which takes another number of rows, too
        for layer in self._filled():
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
        self.length = length

    def _empty(self) -> DynamicCache:
        # Without the model's config, which would make it forget what has left the window.
        cache = DynamicCache()
        end = self.base.blocks if self.end is None else self.end
        cache.layers = [
            self._empty_layer() if self.begin <= block < end else _CountingLayer(self)
            for block in range(self.base.blocks)
        ]
        return cache

    def _empty_layer(self) -> DynamicLayer:
        return _LayerWithRoom(self._room) if self._room else DynamicLayer()

    def _filled(self) -> list[Any]:
        """Those that hold something; what does not keep plain keys and values was refused before."""
        layers: list[Any] = list(self.decoder_cache.layers)
        return [layer for layer in layers if layer.keys is not None]


class _CountingLayer(DynamicLayer):
    """Of a block that is left out. Decoders ask some block of theirs how many tokens the cache holds, to make masks and
    positions: it says as many as the others hold."""

    def __init__(self, cache: PartCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers'
        self._cache = weakref.ref(cache)  # which holds it

    def get_seq_length(self) -> int:
        cache = self._cache()
        assert cache is not None
        return cache.length


class _LayerWithRoom(DynamicLayer):
    """Keys and values of one block, in memory for ``room`` tokens: what it gives are views of it."""

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers'
        self._room = room
        self._memory: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._memory is None:
            self._memory = _memory_for(key_states, self._room), _memory_for(value_states, self._room)
        held = self.get_seq_length()
        keys, values = self._memory
        self.keys, self.values = _append(keys, held, key_states), _append(values, held, value_states)
        return self.keys, self.values


def _memory_for(states: Tensor, room: int) -> Tensor:
    *rows_and_heads, _, width = states.shape
    return states.new_empty(*rows_and_heads, room, width)


def _append(memory: Tensor, held: int, states: Tensor) -> Tensor:
    length = held + states.shape[-2]
    memory[..., held:length, :] = states
    return memory[..., :length, :]
