"""One context of a session: the keys and values of its tokens.

::

    embeds ── blocks before `lowest` ──▶ hidden states ─┬─ the others, the base model alone
                                                        ├─ the others, in the first pass in which adapters write
                                                        └─ …
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .part_forward import PartForward
from .parts import ModelParts


class Ways(NamedTuple):
    """How a context's blocks run: those before ``lowest``, in which no adapter acts, once.

    Attributes:
        has_base: whether those from there on run as they are in the base model; adapted: in how many ways they run
            with adapters.
    """

    lowest: int
    has_base: bool
    adapted: int

    def bytes_per_token(self, parts: ModelParts) -> int:
        """What a context takes of memory for a token."""
        first = parts.cache_bytes_per_token(end=self.lowest) if self.lowest else 0
        waiting = parts.width_after(self.lowest) * parts.base.dtype.itemsize if self.has_base and self.lowest else 0
        return first + (self.has_base + self.adapted) * parts.cache_bytes_per_token(begin=self.lowest) + waiting


class Context:
    """Keys and values of one context, of each block once for each way in which it runs.

    Args:
        room: for how many tokens.

    Attributes:
        room: likewise.
        length: how many tokens it holds, but for what the other blocks of the base model have not had yet.
    """

    def __init__(self, parts: ModelParts, ways: Ways, room: int) -> None:
        lowest = ways.lowest
        self.room = room
        self.length = 0
        self.ways = ways
        self._parts = parts
        self._first = parts.new_cache(end=lowest, room=room) if lowest else None
        self._base = parts.new_cache(begin=lowest, room=room) if ways.has_base else None
        self._adapted = [parts.new_cache(begin=lowest, room=room) for _ in range(ways.adapted)]
        self._waiting: list[Tensor] = []  # what goes into the base model's other blocks, of the last tokens

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens. Raises ``ValueError`` where it does not hold as many."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a context of {self.length} tokens cannot be cropped to {length}")
        if self._waiting and length < self.length:
            waiting = torch.cat(self._waiting, 1)
            left = max(0, waiting.shape[1] - (self.length - length))
            self._waiting = [waiting[:, :left]] if left else []
        for cache in (self._first, self._base, *self._adapted):
            if cache is not None and cache.length > length:
                cache.crop(length)
        self.length = length

    def first(self, embeds: Tensor) -> PartForward | None:
        """The next tokens, (1, tokens, embedding_size), through the first blocks; None: there are none of these."""
        if self._first is None:
            return None
        return PartForward(self._parts, embeds, 0, self.ways.lowest, self._first)

    def take(self, hidden_states: Tensor) -> None:
        """Take in the next tokens, (1, tokens, width), as they come out of the first blocks."""
        if self._base is not None:
            self._waiting.append(hidden_states)
        self.length += hidden_states.shape[1]

    def base(self) -> PartForward:
        """All tokens that they have not had through the base model's other blocks."""
        assert self._base is not None
        hidden_states, self._waiting = torch.cat(self._waiting, 1), []
        return PartForward(self._parts, hidden_states, self.ways.lowest, None, self._base)

    def adapted(self, number: int, hidden_states: Tensor) -> PartForward:
        """The next tokens through the other blocks, in one of the ways in which they run with adapters."""
        return PartForward(self._parts, hidden_states, self.ways.lowest, None, self._adapted[number])

    def take_base_rows(self, number: int, until: int) -> None:
        """Let adapters change nothing up to the token ``until``, in one of the ways."""
        assert self._base is not None
        self._adapted[number].take_rows(self._base, until)
