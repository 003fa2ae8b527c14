"""Hidden states that a server is asked for as they are needed, and that nothing is kept of: to evaluate with."""

from __future__ import annotations

from itertools import chain
from typing import Final

import numpy as np

from dlora.edge.data.batches import MicroBatch
from dlora.edge.wire.connection import Connection
from dlora.edge.wire.usage import WireUsage
from dlora.protocol.messages import Welcome
from dlora.protocol.tensors import FloatArray
from dlora.protocol.wire_codecs import decode_floats

from .encoder import Encoder
from .trainable import WireCounters


class EncodedSource:
    """What comes out of the blocks that a server runs.

    Attributes:
        encoder: who is asked, once it is there, with a session that is open.
    """

    held: Final = None

    def __init__(self) -> None:
        self.encoder: Encoder | None = None

    @property
    def _connection(self) -> Connection:
        assert self.encoder is not None
        return self.encoder.connection

    @property
    def counters(self) -> WireCounters:
        """What crossed so far."""
        return self._connection.session.counters

    @property
    def usage(self) -> WireUsage:
        """Likewise, by role, and the time that it took."""
        return self._connection.usage

    @property
    def welcome(self) -> Welcome:
        """What the server said of itself."""
        return self._connection.welcome

    @property
    def reconnects(self) -> int:
        """As ``Connection`` has it."""
        return self._connection.reconnects

    @property
    def resumed(self) -> int:
        """Likewise."""
        return self._connection.resumed

    def hidden_states(self, batch: MicroBatch) -> FloatArray:
        """Of all texts of a micro-batch, float32 (tokens, width). Raises what ``Encoder.encode`` raises."""
        assert self.encoder is not None
        answers = self.encoder.encode([[ids] for ids in batch.texts()])
        return np.concatenate([decode_floats(tensor) for tensor in chain.from_iterable(answers)])
