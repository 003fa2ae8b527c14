"""One context of a session: the keys and values of its tokens.

::

    embeds ── blocks before `lowest` ──▶ hidden states ─┬─ the others, the base model alone
                                                        ├─ the others, in the first pass in which adapters write
                                                        └─ …
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch
from torch import Tensor

from .parts import ModelParts

_FEW_ROWS: Final = 8
_SMALL_PRODUCT: Final = 2 << 20
"""Weights of a product that one thread is through with, at a few rows, before another has woken up: half of a
millisecond and less. SmolLM2's 0.9 million give a quarter more tokens a second with one thread than with two."""


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
        length: how many tokens it holds, but for what the other blocks of the base model have not had yet.
    """

    def __init__(self, parts: ModelParts, ways: Ways, room: int) -> None:
        lowest = ways.lowest
        self.length = 0
        self.ways = ways
        self._parts = parts
        weights = [target.weight.numel() for target in parts.base.targets.values()]
        self._is_small = max(weights, default=0) <= _SMALL_PRODUCT
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

    def run_first(self, embeds: Tensor) -> Tensor:
        """The next tokens through the first blocks: (1, tokens, width), twice."""
        hidden_states = embeds
        if self._first is not None:
            with self._threads(embeds):
                hidden_states = self._parts.run(embeds, end=self.ways.lowest, cache=self._first)
        if self._base is not None:
            self._waiting.append(hidden_states)
        self.length += embeds.shape[1]
        return hidden_states

    def run_base(self) -> Tensor:
        """All tokens that they have not had through the base model's other blocks: the last hidden states, (1, tokens,
        hidden_size)."""
        assert self._base is not None
        hidden_states, self._waiting = torch.cat(self._waiting, 1), []
        with self._threads(hidden_states):
            return self._parts.run(hidden_states, begin=self.ways.lowest, cache=self._base)

    def run_adapted(self, number: int, hidden_states: Tensor) -> Tensor:
        """The next tokens through the other blocks, in one of the ways in which they run with adapters."""
        with self._threads(hidden_states):
            return self._parts.run(hidden_states, begin=self.ways.lowest, cache=self._adapted[number])

    @contextmanager
    def _threads(self, hidden_states: Tensor) -> Iterator[None]:
        """Within, a few rows of a small model run in one thread."""
        threads = torch.get_num_threads()
        is_one = self._is_small and hidden_states.shape[1] <= _FEW_ROWS and threads > 1
        if is_one:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if is_one:
                torch.set_num_threads(threads)

    def take_base_rows(self, number: int, until: int) -> None:
        """Let adapters change nothing up to the token ``until``, in one of the ways."""
        assert self._base is not None
        self._adapted[number].take_rows(self._base, until)
