"""One of the blocks on the device where adapters act on answers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Array, Graph, scalar
from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import BlockSpec, GraphSpec
from dlora.protocol.tensors import FloatArray

from .attention_masks import Rows
from .trained_block import TrainedBlock

KeysAndValues = tuple[FloatArray, FloatArray]
"""Of some tokens, float32 (tokens, heads, width) each."""

Masks = Mapping[int | None, Mapping[str, FloatArray]]
"""By the window of a block what its graphs take to know which rows see which."""

_KINDS: Final = ("answer_block_forward", "answer_block_backward")
_NO_SCALE: Final = scalar(0.0)  # these have no LoRA


class AnswerBlock(TrainedBlock):
    """A block whose first rows of texts are run once, and its passes at the others, the answers' rows.

    Args:
        is_last: whether it is the last one, of which keys and values may be had alone.

    Attributes:
        key_shapes: (heads, width) of one token's keys, and of its values.
    """

    def __init__(
        self, bundle: Bundle, load: Callable[..., Graph], spec: BlockSpec, rank: int, max_length: int, *, is_last: bool
    ) -> None:
        super().__init__(bundle, load, spec, _KINDS, rank, max_length)
        self._first_spec = bundle.manifest.graph("first_rows", spec.graph)
        self.key_shapes = self._key_shapes(self._first_spec)
        self._first = load("first_rows", spec.graph)
        self._keys_spec: GraphSpec | None = None
        if is_last:
            self._keys_spec = bundle.manifest.graph("last_first_rows", spec.graph)
            if [tensor.name for tensor in self._keys_spec.outputs] != ["keys", "values"]:
                text = f"{self._where('last_first_rows')} gives something else than it must"
                raise BundleError(f"{text}; export the bundle again")
            self._keys = load("last_first_rows", spec.graph)

    def run_first(
        self, x: FloatArray, rows: Rows, masks: Masks, past: KeysAndValues
    ) -> tuple[FloatArray, KeysAndValues]:
        """y (new, width) of first rows that come after others, and their keys and values.

        ``past``: keys and values of the others, which ``masks`` says who sees.
        """
        given = {"x": x, **self.of_rows(rows, masks, past)}
        y, keys, values = self._first(self._inputs(self._first_spec, given, {}, _NO_SCALE))
        self._check_rows("first_rows", y, *x.shape)
        return y, self._checked(keys, values, len(rows))

    def keys_of(self, x: FloatArray, rows: Rows) -> KeysAndValues:
        """The last block's, of first rows: nothing else of it is needed there."""
        assert self._keys_spec is not None
        given = {"x": x, **self.of_positions(rows.places)}
        keys, values = self._keys(self._inputs(self._keys_spec, given, {}, _NO_SCALE))
        return self._checked(keys, values, len(rows))

    def of_rows(self, rows: Rows, masks: Masks, past: KeysAndValues) -> dict[str, Array]:
        """What its graphs take of ``rows`` beside hidden states. ``past``: keys and values of those before; where there
        are none, one stands for them that none sees: no engine takes an empty array."""
        keys, values = past
        if not len(keys):
            keys, values = (np.zeros((1, *shape), np.float32) for shape in self.key_shapes)
        given: dict[str, Array] = {**masks[self.spec.window], "past_keys": keys, "past_values": values}
        return given | self.of_positions(rows.places)

    def _checked(self, keys: FloatArray, values: FloatArray, rows: int) -> KeysAndValues:
        if (keys.shape, values.shape) != tuple((rows, *shape) for shape in self.key_shapes):
            raise BundleError(f"{self._where('keys')} are others than its graphs take; export the bundle again")
        return keys, values
