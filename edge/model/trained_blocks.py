"""The blocks that are trained on the device, one after the other, and the final norm after them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Array, Engine, scalar
from dlora.protocol.errors import BundleError, DataError
from dlora.protocol.manifest import DeviceBlocksSpec
from dlora.protocol.tensors import FloatArray, IntArray

from .trained_block import TrainedBlock


@dataclass(frozen=True)
class Kept:
    """What the backward pass needs of a forward pass.

    Attributes:
        trained: the parameters that gradients are wanted of.
        inputs: for the backward graph of each block from the lowest with such a parameter on, what its forward pass had
            or gave.
        last: what came out of the last block, float32 (labelled, width).
        places: where the labelled rows are among those that the last block gave, int64 (labelled,), or ``rows`` for one
            that no gradient goes through; None: it gave the labelled rows alone, and all of them are.
        rows: how many it gave.
    """

    trained: Collection[str]
    inputs: Sequence[Mapping[str, Array]]
    last: FloatArray
    places: IntArray | None = None
    rows: int = 0


Block = TypeVar("Block", bound=TrainedBlock)


class TrainedBlocks(Generic[Block]):
    """The last blocks of the base model and the final norm after them.

    Args:
        spec: of all that the bundle has.

    Attributes:
        first: the number of the first block.
        max_length: the most tokens of a sequence.
        parameter_shapes: of ``lora_A`` and ``lora_B`` of every module that may have LoRA, by full name.
    """

    def __init__(self, bundle: Bundle, engine: Engine, blocks: Sequence[Block], spec: DeviceBlocksSpec) -> None:
        self.max_length = spec.max_length
        self._blocks = blocks
        self._norm_forward, self._norm_backward = engine.load("final_norm_forward"), engine.load("final_norm_backward")
        self._norm_weights = {name: bundle.weight(file) for name, file in spec.final_norm.items()}
        self.first = blocks[0].spec.index
        self.parameter_shapes = {name: zeros.shape for block in self._blocks for name, zeros in block.zeros.items()}

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
        if grad.shape != kept.last.shape:
            raise BundleError("the bundle's final_norm_backward gives another shape than its rows; export it again")
        if kept.places is not None:
            whole = np.zeros((kept.rows + 1, grad.shape[1]), np.float32)
            whole[kept.places] = grad
            grad = whole[:-1]
        for block, inputs in zip(reversed(self._blocks), reversed(kept.inputs), strict=False):
            grad, found = block.backward(grad, inputs, lora, scale)
            grads |= {name: found[name] for name in kept.trained if name in found}
        return grads

    def _normed(self, hidden_states: FloatArray) -> FloatArray:
        """After the final norm."""
        (normed,) = self._norm_forward({"x": hidden_states, **self._norm_weights})
        return normed
