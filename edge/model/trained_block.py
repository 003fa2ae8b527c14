"""One of the blocks on the device, forward and backward, with LoRA beside its linear modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Final

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Array, Graph
from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import BlockSpec
from dlora.protocol.tensors import FloatArray

from .block_weights import LORA, BlockWeights

_GRAD: Final = "grad."  # what names of a backward graph's outputs begin with: docs/reference/bundle.md has them all


class TrainedBlock(BlockWeights):
    """One block: its two passes, with its weights.

    Args:
        load: gives a graph of the bundle by its kind and key.
        kinds: of the graphs of its passes.
        rank, max_length: as ``BlockWeights`` has them.

    Raises ``BundleError`` as that does, and for graphs that do not belong together.
    """

    def __init__(
        self,
        bundle: Bundle,
        load: Callable[..., Graph],
        spec: BlockSpec,
        kinds: tuple[str, str],
        rank: int,
        max_length: int,
    ) -> None:
        self._forward_spec, self._backward_spec = (bundle.manifest.graph(kind, spec.graph) for kind in kinds)
        lora = [f"{_GRAD}{tensor.name}" for tensor in self._forward_spec.inputs if tensor.name.endswith(LORA)]
        if [tensor.name for tensor in self._backward_spec.outputs] != ["grad_x", *lora]:
            text = f"{bundle.path}: {kinds[1]}.{spec.graph} gives other gradients than it must"
            raise BundleError(f"{text}; export the bundle again")
        super().__init__(bundle, spec, self._forward_spec.inputs, rank, max_length)
        self._forward, self._backward = (load(kind, spec.graph) for kind in kinds)

    def has_any(self, names: Collection[str]) -> bool:
        """Whether one of these parameters is its."""
        return not self.zeros.keys().isdisjoint(names)

    def forward(
        self, given: Mapping[str, Array], lora: Mapping[str, FloatArray], scale: FloatArray
    ) -> tuple[FloatArray, dict[str, Array]]:
        """y (tokens or labelled, width), and what ``backward`` is to be given. ``given``: x and what else its graph
        takes that is neither a weight nor LoRA."""
        y, *products = self._forward(self._inputs(self._forward_spec, given, lora, scale))
        self._check_rows("y", y, self._rows_of(given), given["x"].shape[1])
        names = (tensor.name for tensor in self._forward_spec.outputs[1:])
        return y, dict(given) | dict(zip(names, products, strict=True))

    def _rows_of(self, given: Mapping[str, Array]) -> int:
        """How many rows its forward pass gives."""
        return len(given["label_positions"] if "label_positions" in given else given["x"])

    def backward(
        self, grad: FloatArray, kept: Mapping[str, Array], lora: Mapping[str, FloatArray], scale: FloatArray
    ) -> tuple[FloatArray, dict[str, FloatArray]]:
        """The gradient of x (tokens, width), and those of all LoRA of the block, by full name."""
        grad_x, *grads = self._backward(self._inputs(self._backward_spec, {**kept, "grad": grad}, lora, scale))
        names = (f"{self.spec.path}.{tensor.name.removeprefix(_GRAD)}" for tensor in self._backward_spec.outputs[1:])
        return grad_x, dict(zip(names, grads, strict=True))
