"""What goes into block 0, made on the device: in the mode ``local`` all blocks run here, and no server is asked."""

from __future__ import annotations

from typing import Final

import numpy as np

from dlora.edge.data.batches import MicroBatch
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.wire.usage import WireUsage
from dlora.protocol.errors import BundleError, DataError
from dlora.protocol.tensors import FloatArray

from .ends import Embedding, LongArray
from .held_cache import HeldCache
from .trainable import WireCounters


class LocalSource:
    """The embeddings of texts, as block 0 is given them.

    Args:
        held: as ``HiddenStateSource`` has it; closed with this.

    Attributes:
        reconnects, resumed, usage, welcome: none: nothing is connected to.

    Raises ``BundleError`` for a bundle that has not all blocks, or whose table is another than it must be.
    """

    counters: Final[WireCounters] = (0, 0, 0)
    welcome: Final = None

    def __init__(self, bundle: Bundle, engine: Engine, held: HeldCache | None = None) -> None:
        spec = bundle.manifest.device_blocks
        if spec is None or spec.blocks[0].index:
            text = f"{bundle.path} has not all blocks of its model"
            raise BundleError(f"{text}; export it again with --device-blocks all, or use --device-blocks 0")
        self.held = held
        self.reconnects = self.resumed = 0
        self.usage = WireUsage()
        self._embedding = Embedding(bundle, engine)
        self._scale = np.float32(spec.entry.scale)
        table = spec.entry.positions
        self._positions = None if table is None else bundle.weight(table.file)
        if self._positions is not None:
            width, found = bundle.manifest.base_model.embedding_size, self._positions
            if found.shape[1:] != (width,) or len(found) < spec.max_length or found.dtype != np.float32:
                text = f"{bundle.path}: the table before block 0 is not of (positions, {width}) fp32"
                raise BundleError(f"{text}; export the bundle again")

    def close(self) -> None:
        """Close what is held."""
        if self.held is not None:
            self.held.close()

    def hidden_states(self, batch: MicroBatch) -> FloatArray:
        """Of all texts of a micro-batch, float32 (tokens, width). Raises ``DataError`` for a text longer than the table
        of positions."""
        longest = int(batch.sequence_lengths.max())
        if self._positions is not None and longest > len(self._positions):
            raise DataError(f"a sequence has {longest} tokens, the bundle {len(self._positions)} positions")
        return self.of_tokens(batch.ids, np.concatenate([np.arange(length) for length in batch.sequence_lengths]))

    def of_tokens(self, ids: LongArray, positions: LongArray, *, keep_table: bool = False) -> FloatArray:
        """Of tokens int64 (tokens,) at these places of their texts, which there must be, float32 (tokens, width).

        ``keep_table``: as ``Embedding`` takes it.
        """
        hidden_states = self._embedding(ids, keep_table=keep_table) * self._scale
        return hidden_states if self._positions is None else hidden_states + self._positions[positions]
