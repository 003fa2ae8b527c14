"""What goes into block 0, made on the device: where all blocks run here, no server is asked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from dlora.edge.data.batches import MicroBatch
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.wire.usage import CrossedSoFar
from dlora.protocol.errors import BundleError, DataError
from dlora.protocol.tensors import FloatArray

from .ends import Embedding, LongArray
from .extension import Fed
from .kept_outputs_cache import KeptOutputsCache

if TYPE_CHECKING:
    from .device_generator import DeviceGenerator


class EmbeddingSource:
    """The embeddings of texts, as block 0 is given them.

    Args:
        kept: where what blocks compute alike again and again is kept, None: nowhere; closed with this.

    Raises ``BundleError`` for a bundle that has not all blocks, or whose table is another than it must be.
    """

    def __init__(self, bundle: Bundle, engine: Engine, kept: KeptOutputsCache | None = None) -> None:
        spec = bundle.manifest.device_blocks
        if spec is None or spec.blocks[0].index:
            text = f"{bundle.path} has not all blocks of its model"
            raise BundleError(f"{text}; export it again with --device-blocks all, or use --device-blocks 0")
        self.kept = kept
        self.crossed = CrossedSoFar()
        self._embedding = Embedding(bundle, engine)
        self._scale = np.float32(spec.entry.scale)
        table = spec.entry.positions
        self._positions = None if table is None else bundle.weight(table.file)
        if self._positions is not None:
            width, found = bundle.manifest.base_model.embedding_size, self._positions
            if found.shape[1:] != (width,) or len(found) < spec.max_length or found.dtype != np.float32:
                text = f"{bundle.path}: the table before block 0 is not of (positions, {width}) fp32"
                raise BundleError(f"{text}; export the bundle again")

    @property
    def can_guess(self) -> bool:
        """Nobody does."""
        return False

    def begin(self) -> None:
        """Nothing: nobody is asked."""

    def close(self) -> None:
        """Close what is kept."""
        if self.kept is not None:
            self.kept.close()

    def hidden_states(self, batch: MicroBatch) -> FloatArray:
        """Of all texts of a micro-batch, float32 (tokens, width). Raises ``DataError`` for a text longer than the table
        of positions."""
        longest = int(batch.sequence_lengths.max())
        if self._positions is not None and longest > len(self._positions):
            raise DataError(f"a sequence has {longest} tokens, the bundle {len(self._positions)} positions")
        return self._of_tokens(batch.ids, np.concatenate([np.arange(length) for length in batch.sequence_lengths]))

    @property
    def context_limit(self) -> int:
        """The most tokens of a text."""
        return sys.maxsize if self._positions is None else len(self._positions)

    def feed(self, ids: LongArray, count: int, blocks: DeviceGenerator, drafts: int) -> Fed:
        """As ``EncodingServer`` has it; nobody guesses."""
        held = blocks.length
        blocks.append(self._of_tokens(ids[held:], np.arange(held, len(ids)), keep_table=True))
        return Fed(held)

    def _of_tokens(self, ids: LongArray, positions: LongArray, *, keep_table: bool = False) -> FloatArray:
        """Of tokens int64 (tokens,) at these places of their texts, which there must be, float32 (tokens, width)."""
        hidden_states = self._embedding(ids, keep_table=keep_table) * self._scale
        return hidden_states if self._positions is None else hidden_states + self._positions[positions]
