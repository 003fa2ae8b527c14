"""What lies between this device and its server, and how quick both are, measured before a run begins."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

import numpy as np

from dlora.edge.data.batches import pack
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.model.opening import Opening, open_to_evaluate
from dlora.edge.model.split import SplitModel
from dlora.edge.training.resolved import Resolved
from dlora.edge.wire.connecting import ConnectSettings
from dlora.protocol.device_memory import USUAL_TOKENS

_LEAST_S: Final = 1e-4  # that bytes take: clocks are no finer
_TRIES: Final = 2  # the first one loads what is loaded when it is first used


class Measured(NamedTuple):
    """In seconds and bytes.

    Attributes:
        round_trip_s: of a ping.
        bytes_per_s: that cross, either way, while nothing else does.
        server_s: that the server takes for a token in all blocks, without adapters and without gradients.
        device_s: that the LM head here takes for the loss at a token.
        window: how many micro-batches of a session the server lets be under way.
        runs_rows: whether passes run those rows alone that adapters act at: of families that keep keys and values, all
            but ``mpt`` do, which is taken for one.
    """

    round_trip_s: float
    bytes_per_s: float
    server_s: float
    device_s: float
    window: int
    runs_rows: bool

    @property
    def words(self) -> str:
        """Of the network, for people."""
        return f"{self.round_trip_s * 1e3:.{0 if self.round_trip_s >= 0.01 else 1}f} ms, {self._mbit} Mbit/s"

    @property
    def _mbit(self) -> str:
        mbit = self.bytes_per_s * 8e-6
        return f"{mbit:,.0f}" if mbit >= 10 else f"{mbit:.2g}"


def measure_network(bundle: Bundle, config: Resolved, connecting: ConnectSettings) -> Measured:
    """Ping the run's server, and let it run a few random tokens through the base model. Nothing is sent of any data.

    Raises what ``Connection`` raises.
    """
    device, base = config.device, bundle.manifest.base_model
    opening = Opening(bundle, config.server.server, threads=device.threads, engine=device.engine, connecting=connecting)
    with open_to_evaluate(opening, longest=1) as model:
        assert isinstance(model, SplitModel)
        connection = model.connection
        round_trip_s = connection.ping_s()
        welcome = connection.welcome
        length = max(2, min(USUAL_TOKENS, welcome.max_tokens, welcome.max_sequence_length))
        ids = np.random.default_rng().integers(0, base.vocabulary_size, length).tolist()
        batch = pack([Dataset.of([(ids, list(range(length - 1)))])[0]])
        found = []
        for _ in range(_TRIES):
            usage, counted, computed_s = connection.usage.copy(), model.counters, model.compute_seconds
            started = time.perf_counter()
            model.evaluate(batch)
            seconds, device_s = time.perf_counter() - started, model.compute_seconds - computed_s
            usage = connection.usage.since(usage)
            crossing_s = seconds - device_s - usage.computed_s - usage.queued_s - round_trip_s
            nbytes = sum(model.counters[:2]) - sum(counted[:2])
            found.append((nbytes / max(crossing_s, _LEAST_S), usage.computed_s / length, device_s / length))
    rates, server_s, device_s_each = zip(*found, strict=True)
    runs_rows = welcome.max_context_length > 0
    return Measured(round_trip_s, max(rates), min(server_s), min(device_s_each), welcome.window, runs_rows)
