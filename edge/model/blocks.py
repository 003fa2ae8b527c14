"""The last blocks of the base model on the device: forward and backward, with LoRA beside their linear modules.

A graph is one block's pass and serves all blocks of a shape: they run here one after the other, and are given what a
decoder would give them. A micro-batch is its sequences one after the other; the mask keeps them apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Array, Engine, Graph, scalar
from dlora.protocol.errors import BundleError, DataError
from dlora.protocol.manifest import BlockSpec, GraphSpec
from dlora.protocol.tensors import FloatArray, IntArray

from .block_weights import BLOCKED, LORA, BlockWeights, last_blocks

# Names of graph inputs and outputs; docs/bundle.md has them all.
_MASK: Final = "mask"
_GRAD: Final = "grad."
_GRAD_X: Final = "grad_x"


@dataclass(frozen=True)
class Kept:
    """What the backward pass needs of a forward pass.

    Attributes:
        trained: the parameters that gradients are wanted of.
        inputs: for the backward graph of each block from the lowest with such a parameter on, what its forward pass had
            or gave.
        last: what came out of the last block, float32 (tokens, width).
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
        passes = {key: _Passes.load(bundle, engine, key) for key in {block.graph for block in chosen}}
        self.max_length = spec.max_length
        self._blocks = [_Block(bundle, block, passes[block.graph], rank, spec.max_length) for block in chosen]
        self._norm_forward, self._norm_backward = engine.load("final_norm_forward"), engine.load("final_norm_backward")
        self._norm_weights = {name: bundle.weight(file) for name, file in spec.final_norm.items()}
        self.first = chosen[0].index
        self.parameter_shapes = {name: zeros.shape for block in self._blocks for name, zeros in block.zeros.items()}

    def forward(
        self,
        hidden_states: FloatArray,
        lengths: IntArray,
        lora: Mapping[str, FloatArray],
        scaling: float,
        trained: Collection[str] | None = None,
        begin: int = 0,
    ) -> tuple[FloatArray, Kept]:
        """The last hidden states float32 (tokens, hidden_size), and what ``backward`` needs.

        Args:
            hidden_states: float32 (tokens, width), what comes out of the block before the first, or of the lowest
                ``begin`` of these.
            lengths: int32 (sequences,), their sum is tokens.
            lora: values of parameters, by the names of ``parameter_shapes``; those that are not there count as zeros.
            trained: those of them that ``backward`` is to give gradients of; None: all of ``lora``.

        Raises ``DataError`` for a sequence that is longer than the bundle's tables.
        """
        trained = lora.keys() if trained is None else trained
        kept = list[Mapping[str, Array]]()
        for block, inputs, y in self._forward(self._blocks[begin:], hidden_states, lengths, lora, scaling):
            if kept or block.has_any(trained):
                kept.append(inputs)
            hidden_states = y
        (last,) = self._norm_forward({"x": hidden_states, **self._norm_weights})
        return last, Kept(trained, kept, hidden_states)

    def forward_lowest(
        self, hidden_states: FloatArray, lengths: IntArray, lora: Mapping[str, FloatArray], scaling: float, count: int
    ) -> FloatArray:
        """What comes out of the lowest ``count`` blocks, at least one: float32 (tokens, width). As ``forward``."""
        for _, _, y in self._forward(self._blocks[:count], hidden_states, lengths, lora, scaling):
            hidden_states = y
        return hidden_states

    def _forward(
        self,
        blocks: Sequence[_Block],
        hidden_states: FloatArray,
        lengths: IntArray,
        lora: Mapping[str, FloatArray],
        scaling: float,
    ) -> Iterator[tuple[_Block, dict[str, Array], FloatArray]]:
        """Of each block what its backward graph is to be given, and what comes out of it."""
        self.check_length(int(lengths.max()))
        scale = scalar(scaling)
        masks: dict[int | None, FloatArray] = {}
        positions = np.concatenate([np.arange(length) for length in lengths])
        for block in blocks:
            window = block.spec.window
            if window not in masks:
                masks[window] = attention_mask(lengths, window)
            hidden_states, inputs = block.forward(hidden_states, masks[window], positions, lora, scale)
            yield block, inputs, hidden_states

    def count_below(self, trained: Collection[str]) -> int:
        """How many blocks lie below all that have one of these parameters."""
        return next((place for place, block in enumerate(self._blocks) if block.has_any(trained)), len(self._blocks))

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

        It ends with the lowest block that has such a parameter. ``grad``: float32 (tokens, hidden_size).
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


@dataclass(frozen=True)
class _Passes:
    """The two graphs of a shape of block, and what they take and give."""

    forward: Graph
    backward: Graph
    forward_spec: GraphSpec
    backward_spec: GraphSpec

    @classmethod
    def load(cls, bundle: Bundle, engine: Engine, key: str) -> _Passes:
        kinds = ("block_forward", "block_backward")
        forward, backward = (engine.load(kind, key) for kind in kinds)
        forward_spec, backward_spec = (bundle.manifest.graph(kind, key) for kind in kinds)
        lora = [f"{_GRAD}{tensor.name}" for tensor in forward_spec.inputs if tensor.name.endswith(LORA)]
        if [tensor.name for tensor in backward_spec.outputs] != [_GRAD_X, *lora]:
            text = f"{bundle.path}: block_backward.{key} gives other gradients than it must"
            raise BundleError(f"{text}; export the bundle again")
        return cls(forward, backward, forward_spec, backward_spec)


class _Block(BlockWeights):
    """One block: its passes, with its weights."""

    def __init__(self, bundle: Bundle, spec: BlockSpec, passes: _Passes, rank: int, max_length: int) -> None:
        super().__init__(bundle, spec, passes.forward_spec.inputs, rank, max_length)
        self._passes = passes

    def has_any(self, names: Collection[str]) -> bool:
        """Whether one of these parameters is its."""
        return not self.zeros.keys().isdisjoint(names)

    def forward(
        self, x: FloatArray, mask: FloatArray, positions: IntArray, lora: Mapping[str, FloatArray], scale: FloatArray
    ) -> tuple[FloatArray, dict[str, Array]]:
        """y (tokens, width), and what ``backward`` is to be given."""
        own = {"x": x, _MASK: mask, **self.of_positions(positions)}
        spec = self._passes.forward_spec
        y, *products = self._passes.forward(self._inputs(spec, own, lora, scale))
        return y, own | dict(zip((tensor.name for tensor in spec.outputs[1:]), products, strict=True))

    def backward(
        self, grad: FloatArray, kept: Mapping[str, Array], lora: Mapping[str, FloatArray], scale: FloatArray
    ) -> tuple[FloatArray, dict[str, FloatArray]]:
        """The gradient of x (tokens, width), and those of all LoRA of the block, by full name."""
        spec = self._passes.backward_spec
        grad_x, *grads = self._passes.backward(self._inputs(spec, {**kept, "grad": grad}, lora, scale))
        names = (f"{self.spec.path}.{tensor.name.removeprefix(_GRAD)}" for tensor in spec.outputs[1:])
        return grad_x, dict(zip(names, grads, strict=True))
