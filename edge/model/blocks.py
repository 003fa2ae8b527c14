"""The last blocks of the base model on the device: forward and backward, with LoRA beside their linear modules.

A graph is one block's pass and serves all blocks of a shape: they run here one after the other, and are given what a
decoder would give them. A micro-batch is its sequences one after the other; the mask keeps them apart. For
a token without a label the graphs of the last block compute keys and values only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Array, Engine, scalar
from dlora.protocol.errors import DataError
from dlora.protocol.tensors import FloatArray, IntArray

from .block_weights import BLOCKED, last_blocks
from .trained_block import TrainedBlock

_KINDS: Final = ("block_forward", "block_backward")
_LAST: Final = ("last_block_forward", "last_block_backward")


@dataclass(frozen=True)
class Kept:
    """What the backward pass needs of a forward pass.

    Attributes:
        trained: the parameters that gradients are wanted of.
        inputs: for the backward graph of each block from the lowest with such a parameter on, what its forward pass had
            or gave.
        last: what came out of the last block, float32 (labelled, width).
    """

    trained: Collection[str]
    inputs: Sequence[Mapping[str, Array]]
    last: FloatArray


class DeviceBlocks:
    """The last blocks of the base model and the final norm after them.

    Args:
        count: of blocks.
        rank: of the LoRA beside all modules; those that have none get one of zeros.

    Attributes:
        first: the number of the first block.
        max_length: the most tokens of a sequence.
        parameter_shapes: of ``lora_A`` and ``lora_B`` of every module that may have LoRA, by full name.

    Raises ``BundleError`` where the bundle has fewer blocks.
    """

    def __init__(self, bundle: Bundle, engine: Engine, count: int, rank: int) -> None:
        spec, chosen = last_blocks(bundle, count)
        load = cache(engine.load)
        self.max_length = spec.max_length
        self._blocks = [
            TrainedBlock(bundle, load, block, _LAST if block is chosen[-1] else _KINDS, rank, spec.max_length)
            for block in chosen
        ]
        self._norm_forward, self._norm_backward = engine.load("final_norm_forward"), engine.load("final_norm_backward")
        self._norm_weights = {name: bundle.weight(file) for name, file in spec.final_norm.items()}
        self.first = chosen[0].index
        self.parameter_shapes = {name: zeros.shape for block in self._blocks for name, zeros in block.zeros.items()}

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
        (last,) = self._norm_forward({"x": hidden_states, **self._norm_weights})
        return last, Kept(trained, kept, hidden_states)

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
        positions = np.concatenate([np.arange(length) for length in lengths])
        for block in blocks:
            window = block.spec.window
            if window not in masks:
                masks[window] = attention_mask(lengths, window)
            given: dict[str, Array] = {"x": hidden_states, "mask": masks[window], **block.of_positions(positions)}
            if label_positions is not None and block is self._blocks[-1]:
                given |= labels(label_positions, len(positions))
            hidden_states, inputs = block.forward(given, lora, scale)
            yield block, inputs, hidden_states

    def count_below(self, trained: Collection[str]) -> int:
        """How many blocks lie below all that have one of these parameters; the last one never does."""
        lower = self._blocks[:-1]
        return next((place for place, block in enumerate(lower) if block.has_any(trained)), len(lower))

    def parameters_below(self, count: int) -> set[str]:
        """The parameters that the lowest ``count`` blocks may have."""
        return {name for block in self._blocks[:count] for name in block.zeros}

    def check_length(self, tokens: int) -> None:
        """Raise ``DataError`` for a sequence that is longer than the bundle's tables."""
        if tokens > self.max_length:
            raise DataError(
                f"the data has a sequence of {tokens} tokens, blocks on a device take {self.max_length}; set "
                f"--max-length {self.max_length}"
            )

    def backward(
        self, grad: FloatArray, kept: Kept, lora: Mapping[str, FloatArray], scaling: float
    ) -> dict[str, FloatArray]:
        """The gradients of ``kept.trained``, by name, of ``sum(last hidden states * grad)``.

        It ends with the lowest block that has such a parameter. ``grad``: float32 (labelled, hidden_size).
        """
        scale, grads = scalar(scaling), dict[str, FloatArray]()
        (grad,) = self._norm_backward({"x": kept.last, "grad": grad, **self._norm_weights})
        for block, inputs in zip(reversed(self._blocks), reversed(kept.inputs), strict=False):
            grad, found = block.backward(grad, inputs, lora, scale)
            grads |= {name: found[name] for name in kept.trained if name in found}
        return grads


def attention_mask(lengths: IntArray, window: int | None) -> FloatArray:
    """float32 (1, 1, tokens, tokens), to be added to scores: 0 where a row's token sees a column's, which is of its own
    sequence, not after it, and fewer than ``window`` tokens before it."""
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(sequence))
    back = place[:, None] - place[None, :]
    seen = (sequence[:, None] == sequence[None, :]) & (back >= 0)
    if window is not None:
        seen &= back < window
    return np.where(seen, np.float32(0), BLOCKED)[None, None]


def labels(label_positions: IntArray, tokens: int) -> dict[str, Array]:
    """What the last block is given to know which tokens have a label, and which of them each token is."""
    index = np.full(tokens, len(label_positions), np.int64)
    index[label_positions] = np.arange(len(label_positions))
    return {"label_positions": label_positions.astype(np.int64), "label_index": index}
