"""Tokens that go on in a context, through some blocks: what is to be run, apart from who runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .cache import PartCache
from .parts import ModelParts

_FEW_ROWS: Final = 8
_SMALL_PRODUCT: Final = 5 << 19
_FEW_MULTIPLICATIONS: Final = 12 << 20
"""Weights of a product that one thread is through with, at a few rows, before another has woken up, and these times the
rows: half of a millisecond and less. SmolLM2's 0.9 million give a quarter more tokens a second with one thread than
with two; other widths: benchmarks/few_rows.py."""


@dataclass(frozen=True)
class PartForward:
    """The next tokens of a context through the blocks ``begin`` to ``end - 1``, or to the last and the final norm.

    Attributes:
        hidden_states: (1, tokens, width), what goes into the first of them.
        cache: of these blocks; it takes the tokens in.
    """

    parts: ModelParts
    hidden_states: Tensor
    begin: int
    end: int | None
    cache: PartCache

    @property
    def tokens(self) -> int:
        return self.hidden_states.shape[1]

    def run(self) -> Tensor:
        """(1, tokens, width)."""
        with few_rows_in_one_thread(self.parts, self.tokens):
            return self.parts.run(self.hidden_states, begin=self.begin, end=self.end, cache=self.cache)


@contextmanager
def few_rows_in_one_thread(parts: ModelParts, rows: int) -> Iterator[None]:
    """Within, a few rows of a small model run in one thread."""
    threads = torch.get_num_threads()
    weights = parts.largest_product
    is_small = weights <= _SMALL_PRODUCT and rows * weights < _FEW_MULTIPLICATIONS
    is_one = rows <= _FEW_ROWS and threads > 1 and is_small
    if is_one:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if is_one:
            torch.set_num_threads(threads)
