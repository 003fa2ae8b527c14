"""How fast this device, a server and the link between them are: about a second of each, with random tokens.

Nothing of the user's data is computed with or sent. What comes out is good for an estimate: caches, other programs and
long texts change it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np

from dlora.edge.adapters.compatibility import check_base_model
from dlora.edge.adapters.units import AdapterSet
from dlora.edge.data.batches import MicroBatch
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.model.blocks import DeviceBlocks
from dlora.edge.model.ends import Head
from dlora.edge.model.split import SplitModel
from dlora.edge.model.trunk_source import encoded_width
from dlora.edge.model.use import UseSession
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.connection import Connection
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.choices import Send
from dlora.protocol.wire_codecs import Codecs

_FEW: Final = 16  # tokens, which say whether there is time for
_MANY: Final = 128
_SHORT_S: Final = 0.15
_RANK: Final = 8
_PINGS: Final = 3
_LONGEST_PING_S: Final = 5.0
_FASTEST: Final = 1e9  # bytes a second: what is faster cannot be told from the noise


class DeviceSpeed(msgspec.Struct, frozen=True):
    """Seconds on this device.

    Attributes:
        head_row: of the LM head with loss and gradient, for each labelled token.
        block_forward, block_backward: of one block, for each token; None for a bundle without blocks.
        without_label: the share of these that the last block takes for a token without a label.
        flops: a second, of products like those of adapters.
    """

    head_row: float
    block_forward: float | None
    block_backward: float | None
    without_label: float
    flops: float


class ServerSpeed(msgspec.Struct, frozen=True):
    """A server, and the link to it.

    Attributes:
        forward, token: seconds of a forward pass through all blocks: of any, and for each token of it.
        round_trip: seconds until an answer comes for which nothing is computed.
        bytes_per_s: of what crosses, both ways, with what encodes it.
    """

    forward: float
    token: float
    round_trip: float
    bytes_per_s: float


def measure_device(bundle: Bundle, engine: Engine) -> DeviceSpeed:
    """Time the head, and one block where the bundle has any. Raises ``BundleError``."""
    base, random = bundle.manifest.base_model, np.random.default_rng(0)
    head = Head(bundle, engine)

    def run_head(rows: int) -> None:
        hidden_states = random.standard_normal((rows, base.hidden_size), np.float32)
        head.loss_and_grad(hidden_states, random.integers(0, base.vocabulary_size, rows), 1.0)

    head_row = _seconds_each(run_head)
    forward = backward = None
    without_label = 1.0
    if bundle.manifest.device_blocks is not None:
        blocks = DeviceBlocks(bundle, engine, 1, _RANK)
        lora = {name: np.full(shape, 0.01, np.float32) for name, shape in blocks.parameter_shapes.items()}
        width, passes = encoded_width(bundle.manifest), dict[str, float]()

        def run_block(tokens: int, labelled: int | None = None) -> None:
            started = time.perf_counter()
            x, rows = random.standard_normal((tokens, width), np.float32), np.arange(labelled or tokens, dtype=np.int32)
            last, kept = blocks.forward(x, np.array([tokens], np.int32), rows, lora, 1.0)
            between = time.perf_counter()
            blocks.backward(np.ones_like(last), kept, lora, 1.0)
            passes["forward"], passes["backward"] = between - started, time.perf_counter() - between

        most = min(_MANY, blocks.max_length)
        each = _seconds_each(run_block, most)
        share = passes["forward"] / (passes["forward"] + passes["backward"])
        forward, backward = each * share, each * (1 - share)
        without_label = min(1.0, _seconds_each(lambda tokens: run_block(tokens, 1), most) / each)
    # Two products a row in each direction, of two FLOPs a weight.
    flops = 4.0 * base.vocabulary_size * base.hidden_size / head_row
    return DeviceSpeed(head_row, forward, backward, without_label, flops)


def measure_server(bundle: Bundle, engine: Engine, url: str, settings: ConnectSettings) -> ServerSpeed:
    """Ask the server for a few random texts. Raises what ``Connection`` raises, and ``ModelMismatchError``."""
    manifest = bundle.manifest
    random = np.random.default_rng()
    with Connection(url, settings) as connection:
        welcome = connection.welcome
        check_base_model(bundle, welcome)
        nothing = AdapterSet.create(AdapterSpec(), (), scaling=1.0, seed=(0,), unit="group", kill_every=1)
        session = UseSession(
            connection, nothing, Codecs.all("fp16"), base_fingerprint=manifest.base_model.fingerprint
        )
        session.open()

        def seconds(tokens: int, labelled: int, send: Send) -> float:
            """Of one text, but for what this device computes."""
            model = SplitModel(bundle, engine, session, send=send)
            ids = random.integers(0, manifest.base_model.vocabulary_size, tokens)
            positions = np.arange(tokens - labelled, tokens, dtype=np.int32)
            batch = MicroBatch(ids, np.array([tokens], np.int32), positions, ids[positions])
            found = []
            for _ in range(2):  # what is needed for the first time comes on top of the first
                computed, started = model.compute_seconds, time.perf_counter()
                model.evaluate(batch)
                found.append(time.perf_counter() - started - (model.compute_seconds - computed))
            return max(1e-6, min(found))

        round_trip = min(connection.ping_s(_LONGEST_PING_S) for _ in range(_PINGS))
        tokens = max(2, min(_MANY, welcome.max_tokens, welcome.max_sequence_length))
        short = seconds(1, 1, "token-ids")
        long = seconds(tokens, 1, "token-ids")
        before = _crossed(connection)
        wide = seconds(tokens, tokens, "embeddings")
        crossed = (_crossed(connection) - before) / 2  # of one of the two
    token = max(0.0, long - short) / max(1, tokens - 1)
    forward = max(0.0, short - round_trip - token)
    return ServerSpeed(forward, token, round_trip, min(_FASTEST, crossed / max(1e-9, wide - long)))


def _crossed(connection: Connection) -> int:
    return connection.session.bytes_sent + connection.session.bytes_received


def _seconds_each(run: Callable[[int], Any], most: int = _MANY) -> float:
    """Seconds that ``run`` takes for each of the things that it is given a number of."""
    count = min(_FEW, most)
    run(count)  # graphs are loaded and weights read
    taken = _timed(run, count)
    if taken < _SHORT_S and most > count:
        count = most
        taken = min(_timed(run, count) for _ in range(2))
    return taken / count


def _timed(run: Callable[[int], Any], count: int) -> float:
    started = time.perf_counter()
    run(count)
    return max(1e-9, time.perf_counter() - started)
