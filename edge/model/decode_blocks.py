"""The last blocks of the base model on the device, with the keys and values of the tokens that they have seen.

The tokens of one context go through them one after the other, or many at a time: a graph is given the new ones, and the
keys and values of those before, which are kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Final

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine, Graph, scalar
from dlora.protocol.errors import BundleError, UsageError
from dlora.protocol.manifest import BlockSpec
from dlora.protocol.tensors import FloatArray

from .attention_masks import Rows, attention_mask
from .block_weights import BLOCKED, BlockWeights, cannot_go_on, last_blocks
from .device_lora import DeviceLora

_MOST_NEW: Final = 128  # tokens at once: what attention needs is so many times the context
_SCALE: Final = scalar(1.0)  # of the LoRA, which has its own in it
_FIRST_ROOM: Final = 64  # tokens; doubled whenever it is full


class DecodeBlocks:
    """The last blocks and the final norm, of one context.

    Args:
        count: of blocks.
        lora: the adapters, which never change.

    Attributes:
        first: the number of the first block.
        length: how many tokens it holds keys and values of.
        limit: the most.

    Raises ``BundleError`` where the bundle has fewer blocks, or none that go on from earlier tokens.
    """

    def __init__(self, bundle: Bundle, engine: Engine, count: int, lora: DeviceLora) -> None:
        spec, chosen = last_blocks(bundle, count)
        if spec.without_decode is not None:
            raise cannot_go_on(bundle, spec.without_decode)
        load = cache(engine.load)
        self.first = chosen[0].index
        self.length = 0
        most_new, most_past = _bounds(bundle, engine)
        self.limit = min(spec.max_length, most_past)
        self._most_new = min(_MOST_NEW, most_new)
        self._blocks = [_Block(bundle, load, block, lora.rank, spec.max_length) for block in chosen]
        if missing := sorted(set(lora.values) - {name for block in self._blocks for name in block.zeros}):
            module = missing[0].rpartition(".")[0]
            raise UsageError(f"{module} cannot have an adapter in blocks on a device; use --device-blocks 0")
        self._lora = lora.values
        self._norm = engine.load("final_norm_forward")
        self._norm_weights = {name: bundle.weight(file) for name, file in spec.final_norm.items()}

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; it may hold fewer."""
        self.length = min(length, self.length)

    def append(self, hidden_states: FloatArray, *, with_lora: bool = True) -> FloatArray:
        """The last hidden states float32 (tokens, hidden_size) of tokens that come after those that it holds; it then
        holds these, too.

        Args:
            hidden_states: float32 (tokens, width), what comes out of the block before the first; no more than there is
                room for.
            with_lora: whether the adapters act on them.
        """
        lora: Mapping[str, FloatArray] = self._lora if with_lora else {}
        parts = []
        for start in range(0, len(hidden_states), self._most_new):
            x = hidden_states[start : start + self._most_new]
            for block in self._blocks:
                x = block.append(x, self.length, lora)
            self.length += len(x)
            parts.append(x)
        last = parts[0] if len(parts) == 1 else np.concatenate(parts)
        (normed,) = self._norm({"x": last, **self._norm_weights})
        return normed


def _bounds(bundle: Bundle, engine: Engine) -> tuple[int, int]:
    """The most new tokens, and tokens before them, that the engine's programs take at once."""
    spec = bundle.manifest.executorch
    if spec is None or engine.name != "executorch":
        return 2**31, 2**31
    return spec.bounds["new"], spec.bounds["past"]


class _Block(BlockWeights):
    """One block, its weights, and the keys and values of the tokens that it has seen.

    These begin with one that no token sees, for no engine takes an empty array.
    """

    def __init__(self, bundle: Bundle, load: Callable[..., Graph], spec: BlockSpec, rank: int, max_length: int) -> None:
        self._graph_spec = bundle.manifest.graph("block_decode", spec.graph)
        super().__init__(bundle, spec, self._graph_spec.inputs, rank, max_length)
        self._graph = load("block_decode", spec.graph)
        self._keys, self._values = (
            np.zeros((1 + _FIRST_ROOM, *shape), np.float32) for shape in self._key_shapes(self._graph_spec)
        )

    def append(self, x: FloatArray, position: int, lora: Mapping[str, FloatArray]) -> FloatArray:
        """y (new, width) of tokens that come after the first ``position``, which it has seen."""
        new = len(x)
        window, mine = self.spec.window, Rows.of(np.array([new]))
        first = 0 if window is None else max(0, position - max(1, window - 1))  # older ones none sees
        past = slice(1 + first, 1 + position) if position else slice(0, 1)
        own = {
            "x": x,
            "past_mask": _past_mask(new, position, first, window),
            "mask": attention_mask(mine, mine, window),
            "past_keys": self._keys[past],
            "past_values": self._values[past],
            **self.of_positions(np.arange(position, position + new, dtype=np.int32)),
        }
        y, keys, values = self._graph(self._inputs(self._graph_spec, own, lora, _SCALE))
        if 1 + position + new > len(self._keys):
            rows = max(1 + position + new, 2 * len(self._keys))
            self._keys, self._values = _with_room(self._keys, rows), _with_room(self._values, rows)
        for kept, found in ((self._keys, keys), (self._values, values)):
            place = kept[1 + position : 1 + position + new]
            if found.shape != place.shape:
                raise BundleError(f"{self._where('block_decode')} gives other keys than it takes; export it again")
            place[:] = found
        return y


def _with_room(array: FloatArray, rows: int) -> FloatArray:
    """With zeros after it, which nobody has written: they take no memory before they are used (``np.pad`` writes)."""
    grown = np.zeros((rows, *array.shape[1:]), np.float32)
    grown[: len(array)] = array
    return grown


def _past_mask(new: int, position: int, first: int, window: int | None) -> FloatArray:
    """float32 (1, 1, new, past), to be added to scores: what tokens from ``position`` on see of those from ``first`` to
    before it; where there are none, of one that none sees."""
    if not position:
        return np.full((1, 1, new, 1), BLOCKED)
    if window is None:
        return np.zeros((1, 1, new, position - first), np.float32)
    back = np.arange(position, position + new)[:, None] - np.arange(first, position)[None, :]
    return np.where(back < window, np.float32(0), BLOCKED)[None, None]
