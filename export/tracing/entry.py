"""What a decoder does between its embeddings and its first block, for a device that runs all blocks itself.

Most decoders do nothing there. Some multiply (Granite), some add a row for each position (GPT-2, OPT): that much a
device can do. A norm (BLOOM) or a projection between them is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel

from .calls import CannotRunOnDevice, calls_without_computing, near, random_embeds, record_calls, table_rows

_TOLERANCE: Final = 1e-5  # of what is rounded, relative to the largest value
_DIGITS: Final = 6  # a family's factor is a number that somebody wrote, not one of a sum


class CannotBeginOnDevice(CannotRunOnDevice):
    """A base model whose blocks a device can run, but not from the embeddings on; the message says why."""


@dataclass(frozen=True)
class Entry:
    """``x = scale * embedding + positions[position]``, the input of block 0.

    Attributes:
        positions: float32 (positions, width); None where nothing is added.
    """

    scale: float
    positions: Tensor | None

    def __call__(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (tokens, width) of embeddings (tokens, embedding_size) at ``positions``, int64 (tokens,)."""
        scaled = embeds * self.scale
        return scaled if self.positions is None else scaled + self.positions[positions]


def find_entry(base: BaseModel) -> Entry:
    """What ``base`` does before its first block. Raises ``CannotBeginOnDevice`` for anything but the above."""
    (first, embeds), (second, others) = _inputs(base, 0), _inputs(base, 1)
    if first.shape != embeds.shape:
        raise CannotBeginOnDevice(
            f"its embeddings are {embeds.shape[1]} wide and made {first.shape[1]} before block 0, by a projection"
        )
    change, wanted = (embeds - others).double(), (first - second).double()
    exact = float((change * wanted).sum() / (change * change).sum())
    scale = float(f"{exact:.{_DIGITS}g}")
    if not near(change * scale, wanted, _TOLERANCE):
        raise CannotBeginOnDevice("its embeddings go through a norm, or what is no factor, before block 0")
    rows = table_rows(base)
    table, short = (
        calls_without_computing(base, tokens, eager=False)[0].hidden_states() for tokens in (rows, rows // 2 + 1)
    )  # of embeddings that are all zero
    if not torch.allclose(table[: len(short)], short, rtol=1e-6, atol=1e-6):
        raise CannotBeginOnDevice("what is added to its embeddings before block 0 depends on how many tokens there are")
    entry = Entry(scale, table.float() if bool(table.any()) else None)
    if not near(entry(embeds, torch.arange(len(embeds))), first, _TOLERANCE):
        raise CannotBeginOnDevice("what is added to its embeddings before block 0 depends on more than positions")
    return entry


def _inputs(base: BaseModel, seed: int) -> tuple[Tensor, Tensor]:
    """What block 0 is given, (tokens, width), for random embeddings, (tokens, embedding_size)."""
    call = record_calls(base, seed=seed)[0]
    return call.hidden_states(), random_embeds(base, call.tokens, seed)[0]
