"""One of the last blocks of the base model: its weights and tables, and what its graphs are given of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Array
from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import BlockSpec, DeviceBlocksSpec, GraphSpec, Manifest, TensorSpec
from dlora.protocol.tensors import FloatArray, IntArray

LORA: Final = (".lora_A", ".lora_B")  # what names of a block's graph inputs end in: docs/reference/bundle.md
_INT4_VALUES: Final = 2  # in a byte of a weight of int4, which is (out, groups, bytes)
BLOCKED: Final = np.finfo(np.float32).min  # added to a score where a token does not see another


def last_blocks(bundle: Bundle, count: int) -> tuple[DeviceBlocksSpec, tuple[BlockSpec, ...]]:
    """The last ``count`` blocks of a bundle. Raises ``BundleError`` where it has fewer."""
    spec = bundle.manifest.device_blocks
    has = 0 if spec is None else len(spec.blocks)
    if spec is None or not 1 <= count <= has:
        raise BundleError(
            f"{bundle.path} has {has} blocks for a device, not {count}; export it again with --device-blocks {count}"
        )
    return spec, spec.blocks[-count:]


def cannot_go_on(bundle: Bundle, reason: str) -> BundleError:
    """What to raise for blocks that do not go on from keys and values of earlier tokens."""
    text = f"the blocks of {bundle.path} cannot go on from earlier tokens on a device: {reason}"
    return BundleError(f"{text}; use --device-blocks 0")


class BlockWeights:
    """One block, with its weights.

    Args:
        inputs: of one of its graphs, with all of its LoRA.
        rank: of the LoRA; modules that have none get one of zeros.
        max_length: the most tokens of a sequence.

    Attributes:
        zeros: that LoRA, by the parameters' full names.

    Raises ``BundleError`` for tables that are too short, and LoRA without a weight.
    """

    def __init__(
        self, bundle: Bundle, spec: BlockSpec, inputs: Sequence[TensorSpec], rank: int, max_length: int
    ) -> None:
        self.spec = spec
        self._weights = {name: bundle.weight(file) for name, file in spec.weights.items()}
        self._tables = {name: (bundle.weight(table.file), table.axis) for name, table in spec.tables.items()}
        for name, (table, axis) in self._tables.items():
            if axis >= table.ndim or table.shape[axis] < max_length:
                raise BundleError(f"{self._where(name)} has too few positions; export the bundle again")
        self.zeros = {}
        for tensor in inputs:
            if tensor.name.endswith(LORA):
                shape = self._lora_shape(tensor, rank)
                self.zeros[f"{spec.path}.{tensor.name}"] = np.zeros(shape, np.float32)

    def of_positions(self, positions: IntArray) -> dict[str, FloatArray]:
        """What a decoder would give the block for tokens at these places of their sequences."""
        return {name: np.take(table, positions, axis) for name, (table, axis) in self._tables.items()}

    def _key_shapes(self, spec: GraphSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(heads, width) of one token's keys, and of its values, in a graph that takes and gives some: not much wider
        than a weight, which is as large as its file."""
        if [tensor.name for tensor in spec.outputs] != ["y", "keys", "values"]:
            raise BundleError(f"{self._where(spec.kind)} gives something else than it must; export it again")
        widest = max((size for weight in self._weights.values() for size in weight.shape), default=0)
        found = []
        for name in ("past_keys", "past_values"):
            shape = next((each.shape for each in spec.inputs if each.name == name), ())
            sizes = tuple(size for size in shape if isinstance(size, int))
            if len(shape) != 3 or shape[0] != "past" or len(sizes) != 2 or not 0 < math.prod(sizes) <= 4 * widest:
                raise BundleError(f"{self._where(name)} are not (past, heads, width); export the bundle again")
            found.append(sizes)
        return found[0], found[1]

    def _check_rows(self, name: str, found: Array, rows: int, width: int) -> None:
        """Raise ``BundleError`` where a graph gives another shape than (rows, width)."""
        if found.shape != (rows, width):
            raise BundleError(f"{self._where(name)} has another shape than its rows; export the bundle again")

    def _where(self, name: str) -> str:
        return f"the bundle's {name} of block {self.spec.index}"

    def _lora_shape(self, tensor: TensorSpec, rank: int) -> tuple[int, int]:
        """Of a ``lora_A`` or ``lora_B``, whose widths are those of the weight beside it: no larger than a file."""
        module, _, side = tensor.name.rpartition(".")
        weight = self._weights.get(f"{module}.weight")
        if weight is None or weight.ndim not in (2, 3):
            raise BundleError(f"{self._where(module)} has no weight; export the bundle again")
        out_features, in_features = weight.shape[0], weight[0].size * (1 if weight.ndim == 2 else _INT4_VALUES)
        expected = ("rank", in_features) if side == "lora_A" else (out_features, "rank")
        if tensor.shape != expected:
            raise BundleError(f"{self._where(tensor.name)} has another shape than its weight; export the bundle again")
        return (rank, in_features) if side == "lora_A" else (out_features, rank)

    def _inputs(
        self, spec: GraphSpec, own: Mapping[str, Array], lora: Mapping[str, FloatArray], scale: FloatArray
    ) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for tensor in spec.inputs:
            if tensor.name == "scale":
                found[tensor.name] = scale
            elif tensor.name in own:
                found[tensor.name] = own[tensor.name]
            elif tensor.name in self._weights:
                found[tensor.name] = self._weights[tensor.name]
            elif (name := f"{self.spec.path}.{tensor.name}") in self.zeros:
                found[tensor.name] = lora.get(name, self.zeros[name])
            else:
                raise BundleError(f"block {self.spec.index} has no {tensor.name}, which its graph takes; export again")
        return found


def keys_width(manifest: Manifest, count: int) -> int:
    """Numbers of one token's keys and values in the last ``count`` blocks. Raises ``BundleError`` where the bundle has
    none that go on from earlier tokens."""
    blocks, total = manifest.device_blocks, 0
    if blocks is None or blocks.without_decode is not None:
        raise BundleError("the bundle has no blocks that go on from earlier tokens; export it again")
    for block in blocks.blocks[-count:]:
        for tensor in manifest.graph("first_rows", block.graph).inputs:
            if tensor.name in ("past_keys", "past_values"):
                total += math.prod(size for size in tensor.shape if isinstance(size, int))
    return total


def encoded_width(manifest: Manifest) -> int:
    """Width of the hidden states that go into the blocks on the device. Raises ``BundleError`` for a bundle without."""
    blocks = manifest.device_blocks
    if blocks is None:
        raise BundleError("the bundle has no blocks for a device; export it again with --device-blocks")
    for tensor in manifest.graph("block_forward", blocks.blocks[0].graph).inputs:
        if tensor.name == "x" and len(tensor.shape) == 2 and isinstance(width := tensor.shape[1], int) and width > 0:
            return width
    raise BundleError("the bundle's block_forward takes no hidden states; export it again")
