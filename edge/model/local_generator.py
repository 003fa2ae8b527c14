"""A model to generate with in the mode ``local``: all blocks run here, and no server is asked."""

from __future__ import annotations

from typing import Final

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.protocol.errors import DataError

from .decode_blocks import DecodeBlocks
from .device_generator import DeviceGenerator
from .ends import LongArray
from .local_source import LocalSource
from .trainable import WireCounters


class LocalGenerator(DeviceGenerator):
    """As ``GeneratingModel`` has it; ``blocks`` are all that the model has."""

    counters: Final[WireCounters] = (0, 0, 0)

    def __init__(
        self, bundle: Bundle, engine: Engine, blocks: DecodeBlocks, *, context_length: int, invocation: tuple[int, ...]
    ) -> None:
        super().__init__(bundle, engine, blocks, invocation)
        self.context_limit = min(context_length, blocks.limit)
        self._source = LocalSource(bundle, engine)

    def _take_in(self, ids: LongArray, acts_from: int, count: int) -> int:
        if len(ids) > self.context_limit:
            raise DataError(f"the text has {len(ids)} tokens, there is room for {self.context_limit}; begin anew")
        held = self._blocks.length
        positions = np.arange(held, len(ids))
        self._append(self._source.of_tokens(ids[held:], positions, keep_table=True), acts_from, count)
        return held
