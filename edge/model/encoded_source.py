"""Hidden states that a server is asked for as they are needed, and that nothing is kept of: to evaluate with."""

from __future__ import annotations

from itertools import chain

import numpy as np

from dlora.edge.data.batches import MicroBatch
from dlora.protocol.tensors import FloatArray
from dlora.protocol.wire_codecs import decode_floats

from .encoder import Encoder
from .trainable import WireCounters


class EncodedSource:
    """What comes out of the blocks that a server runs.

    Args:
        encoder: one whose session is open.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    @property
    def counters(self) -> WireCounters:
        """What crossed so far."""
        return self._encoder.connection.session.counters

    @property
    def reconnects(self) -> int:
        """As ``Connection`` has it."""
        return self._encoder.connection.reconnects

    @property
    def resumed(self) -> int:
        """Likewise."""
        return self._encoder.connection.resumed

    def hidden_states(self, batch: MicroBatch) -> FloatArray:
        """Of all texts of a micro-batch, float32 (tokens, width). Raises what ``Encoder.encode`` raises."""
        texts = np.split(batch.ids, np.cumsum(batch.sequence_lengths)[:-1])
        answers = self._encoder.encode([[ids] for ids in texts])
        return np.concatenate([decode_floats(tensor) for tensor in chain.from_iterable(answers)])
