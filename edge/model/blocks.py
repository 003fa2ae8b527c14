"""The last blocks of the base model on the device: forward and backward, with LoRA beside their linear modules.

A graph is one block's pass and serves all blocks of a shape: they run here one after the other, and are given what a
decoder would give them. A micro-batch is its sequences one after the other; the mask keeps them apart. For
a token without a label the graphs of the last block compute keys and values only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Final

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Array, Engine, scalar
from dlora.protocol.tensors import FloatArray, IntArray

from .attention_masks import Rows, attention_mask
from .block_weights import last_blocks
from .trained_block import TrainedBlock
from .trained_blocks import Kept, TrainedBlocks

_KINDS: Final = ("block_forward", "block_backward")
_LAST: Final = ("last_block_forward", "last_block_backward")


class DeviceBlocks(TrainedBlocks[TrainedBlock]):
    """As ``TrainedBlocks``, of all tokens of a micro-batch; of the last block, of labelled ones.

    Args:
        count: of blocks.
        rank: of the LoRA beside all modules; those that have none get one of zeros.

    Raises ``BundleError`` where the bundle has fewer blocks.
    """

    def __init__(self, bundle: Bundle, engine: Engine, count: int, rank: int) -> None:
        spec, chosen = last_blocks(bundle, count)
        load, longest = cache(engine.load), spec.max_length
        blocks = [
            TrainedBlock(bundle, load, block, _LAST if block is chosen[-1] else _KINDS, rank, longest)
            for block in chosen
        ]
        super().__init__(bundle, engine, blocks, spec)

    def forward(
        self,
        hidden_states: FloatArray,
        lengths: IntArray,
        label_positions: IntArray,
        lora: Mapping[str, FloatArray],
        scaling: float,
        trained: Collection[str] | None = None,
        begin: int = 0,
    ) -> tuple[FloatArray, Kept]:
        """The last hidden states of labelled tokens, float32 (labelled, hidden_size), and what ``backward`` needs.

        Args:
            hidden_states: float32 (tokens, width), what comes out of the block before the first, or of the lowest
                ``begin`` of these.
            lengths: int32 (sequences,), their sum is tokens.
            label_positions: places of the labelled tokens among all of them, (labelled,), in order.
            lora: values of parameters, by the names of ``parameter_shapes``; those that are not there count as zeros.
            trained: those of them that ``backward`` is to give gradients of; None: all of ``lora``.

        Raises ``DataError`` for a sequence that is longer than the bundle's tables.
        """
        trained = lora.keys() if trained is None else trained
        kept = list[Mapping[str, Array]]()
        blocks = self._blocks[begin:]
        for block, inputs, y in self._forward(blocks, hidden_states, lengths, lora, scaling, label_positions):
            if kept or block.has_any(trained):
                kept.append(inputs)
            hidden_states = y
        return self._normed(hidden_states), Kept(trained, kept, hidden_states)

    def forward_lowest(
        self, hidden_states: FloatArray, lengths: IntArray, lora: Mapping[str, FloatArray], scaling: float, count: int
    ) -> FloatArray:
        """What comes out of the lowest ``count`` blocks, at least one and not the last: float32 (tokens, width).

        As ``forward``.
        """
        assert 0 < count < len(self._blocks)
        for _, _, y in self._forward(self._blocks[:count], hidden_states, lengths, lora, scaling):
            hidden_states = y
        return hidden_states

    def _forward(
        self,
        blocks: Sequence[TrainedBlock],
        hidden_states: FloatArray,
        lengths: IntArray,
        lora: Mapping[str, FloatArray],
        scaling: float,
        label_positions: IntArray | None = None,
    ) -> Iterator[tuple[TrainedBlock, dict[str, Array], FloatArray]]:
        """Of each block what its backward graph is to be given, and what comes out of it: of the last one for
        ``label_positions``."""
        self.check_length(int(lengths.max()))
        scale = scalar(scaling)
        masks: dict[int | None, FloatArray] = {}
        rows = Rows.of(lengths)
        for block in blocks:
            window = block.spec.window
            if window not in masks:
                masks[window] = attention_mask(rows, rows, window)
            given: dict[str, Array] = {"x": hidden_states, "mask": masks[window], **block.of_positions(rows.places)}
            if label_positions is not None and block is self._blocks[-1]:
                given |= labels(label_positions, len(rows))
            hidden_states, inputs = block.forward(given, lora, scale)
            yield block, inputs, hidden_states

    def count_below(self, trained: Collection[str]) -> int:
        """How many blocks lie below all that have one of these parameters; the last one never does."""
        lower = self._blocks[:-1]
        return next((place for place, block in enumerate(lower) if block.has_any(trained)), len(lower))

    def parameters_below(self, count: int) -> set[str]:
        """The parameters that the lowest ``count`` blocks may have."""
        return {name for block in self._blocks[:count] for name in block.zeros}


def labels(label_positions: IntArray, tokens: int) -> dict[str, Array]:
    """What the last block is given to know which tokens have a label, and which of them each token is."""
    index = np.full(tokens, len(label_positions), np.int64)
    index[label_positions] = np.arange(len(label_positions))
    return {"label_positions": label_positions.astype(np.int64), "label_index": index}
