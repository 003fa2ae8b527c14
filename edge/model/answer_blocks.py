"""The last blocks of the base model on the device where adapters act on answers only.

::

    text 1   f f f f a a a     first rows: no adapter reaches them. They are run once, without gradients; of each block
    text 2   f f a a a a a     their keys and values are kept.
    text 3   a a               answers' rows: forward and backward, end to end. They see the first rows of their own
                               text, and of the answers' rows those before them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np

from dlora.edge.data.batches import MicroBatch
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Array, Engine, scalar
from dlora.protocol.tensors import FloatArray

from .answer_block import AnswerBlock, KeysAndValues, Masks
from .attention_masks import Rows, attention_mask
from .block_weights import BLOCKED, cannot_go_on, last_blocks
from .trained_blocks import Kept, TrainedBlocks

_MOST_NEW: Final = 256
"""First rows at once: what attention needs is so many times those before them."""


@dataclass(frozen=True)
class FirstRows:
    """What the answers' rows need of the first rows of some texts.

    Attributes:
        keys: of each block their keys and values.
        last: what comes out of the last block, float32 (first, width); None: it was not wanted.
    """

    keys: Sequence[KeysAndValues]
    last: FloatArray | None = None


class AnswerBlocks(TrainedBlocks[AnswerBlock]):
    """As ``TrainedBlocks``; of the last block, of all answers' rows.

    Args:
        count: of blocks.
        rank: as ``DeviceBlocks`` has it.
        most_new: the most tokens that ``first_rows`` takes at once; None: any number.

    Attributes:
        count: likewise.

    Raises ``BundleError`` as that does, and where the blocks cannot go on from earlier tokens.
    """

    def __init__(self, bundle: Bundle, engine: Engine, count: int, rank: int, most_new: int | None = None) -> None:
        spec, chosen = last_blocks(bundle, count)
        if spec.without_decode is not None:
            raise cannot_go_on(bundle, spec.without_decode)
        load, longest = cache(engine.load), spec.max_length
        blocks = [AnswerBlock(bundle, load, block, rank, longest, is_last=block is chosen[-1]) for block in chosen]
        super().__init__(bundle, engine, blocks, spec)
        self.count = count
        self._most_new = min(_MOST_NEW, most_new or _MOST_NEW)

    @property
    def keys_width(self) -> int:
        """Numbers of one token's keys and values, of all blocks."""
        return sum(map(math.prod, self.key_shapes))

    @property
    def key_shapes(self) -> list[tuple[int, ...]]:
        """(heads, width) of one token's keys and values, of each block keys and then values."""
        return [shape for block in self._blocks for shape in block.key_shapes]

    def run_first(self, hidden_states: FloatArray, rows: Rows, *, wants_last: bool = False) -> FirstRows:
        """What there is of first rows, float32 (first, width) as they go into the first block; maybe none.

        ``wants_last``: whether what comes out of the last block is wanted, too.
        """
        keys = [_room_for(len(rows), block) for block in self._blocks]
        parts = []
        for start in range(0, len(rows), self._most_new):
            end = min(start + self._most_new, len(rows))
            new, x = rows.only(slice(start, end)), hidden_states[start:end]
            masks = self._masks(new, rows.only(slice(0, start)))
            for block, kept in zip(self._blocks, keys, strict=True):
                if block is self._blocks[-1] and not wants_last:
                    found = block.keys_of(x, new)
                else:
                    x, found = block.run_first(x, new, masks, (kept[0][:start], kept[1][:start]))
                for whole, part in zip(kept, found, strict=True):
                    whole[start:end] = part
            parts.append(x)
        last = np.concatenate(parts) if parts and wants_last else None
        return FirstRows(keys, last)

    def forward(
        self,
        hidden_states: FloatArray,
        batch: MicroBatch,
        lora: Mapping[str, FloatArray],
        scaling: float,
        trained: Collection[str] | None = None,
        first: FirstRows | None = None,
    ) -> tuple[FloatArray, Kept]:
        """As ``DeviceBlocks.forward``, of a micro-batch whose adapters act at its ``crossing_positions``.

        Args:
            first: what there is of its first rows, where they were run before.
        """
        self.check_length(int(batch.sequence_lengths.max()))
        trained = lora.keys() if trained is None else trained
        rows, acts = Rows.of(batch.sequence_lengths), acting_rows(batch)
        seen, mine = rows.only(~acts), rows.only(acts)
        wants_last = not acts[batch.label_positions].all()
        if first is None or (first.last is None and wants_last):
            first = self.run_first(hidden_states[~acts], seen, wants_last=wants_last)
        x, kept, scale = hidden_states[acts], list[Mapping[str, Array]](), scalar(scaling)
        masks = self._masks(mine, seen)
        for block, past in zip(self._blocks if len(mine) else (), first.keys, strict=False):
            x, inputs = block.forward({"x": x, **block.of_rows(mine, masks, past)}, lora, scale)
            if kept or block.has_any(trained):
                kept.append(inputs)
        last = np.zeros((len(rows), x.shape[1]), np.float32)
        last[acts] = x
        if first.last is not None:
            last[~acts] = first.last
        last = last[batch.label_positions]
        places = np.where(acts, np.cumsum(acts) - 1, len(mine))[batch.label_positions]
        return self._normed(last), Kept(trained, kept, last, places, len(mine))

    def _masks(self, rows: Rows, seen: Rows) -> Masks:
        """Which of ``rows`` see which of each other, and of those ``seen`` before them; one that none sees where there
        are none of these."""
        found: dict[int | None, dict[str, FloatArray]] = {}
        for window in {block.spec.window for block in self._blocks}:
            past = attention_mask(rows, seen, window) if len(seen) else np.full((1, 1, len(rows), 1), BLOCKED)
            found[window] = {"mask": attention_mask(rows, rows, window), "past_mask": past}
        return found


def _room_for(rows: int, block: AnswerBlock) -> KeysAndValues:
    keys, values = (np.zeros((rows, *shape), np.float32) for shape in block.key_shapes)
    return keys, values


def acting_rows(batch: MicroBatch) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of its tokens are answers' rows, bool (tokens,)."""
    if batch.crossing_positions is None:
        return np.ones(len(batch.ids), np.bool_)
    found = np.zeros(len(batch.ids), np.bool_)
    found[batch.crossing_positions] = True
    return found
