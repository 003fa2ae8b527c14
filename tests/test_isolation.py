"""Devices of one server do not touch each other: each gets the bits that it gets alone, whatever the others do."""

from __future__ import annotations

import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import conversations
import numpy as np
import pytest
from families import VOCABULARY
from serving import config, final_weights, random_dataset, serving, training
from tiny import TinyFactory
from waiting import eventually
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from dlora.cloud.admission import tokens as cloud_tokens
from dlora.cloud.admission.access import Access
from dlora.cloud.admission.tokens import BearerTokenStore
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.serving import server as cloud_server
from dlora.cloud.serving.timeouts import SessionTimeouts
from dlora.edge.training.resolved import Resolved
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.connection import Connection
from dlora.edge.wire.credentials import Credentials
from dlora.protocol import messages as m
from dlora.protocol.frames import encode
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.version import PROTOCOL_VERSIONS
from dlora.protocol.wire_codecs import encode_floats

STEPS = 8
WIDTH = 64
BLOCKS = 3
GLUTTONS_TOKENS = 512 * WIDTH  # frames of 2 and 3 MB: two of them are more than a loopback socket buffers
KILLING = {
    "active_fraction": 0.4, "score": "grad", "warmup_steps": 2, "warmup_fraction": 0.0, "kill_every": 2,
    "revive_every": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """One device's run: its bundle, settings and data."""

    bundle: Path
    run: Resolved
    data_seed: int

    def train(self, url: str, ready: threading.Barrier | None = None) -> tuple[dict[str, bytes], list[float]]:
        """The bits of its final adapters, and its losses."""
        with training(self.bundle, url, self.run, random_dataset(VOCABULARY, seed=self.data_seed)) as trainer:
            if ready is not None:
                ready.wait(120)
            losses = [trainer.run_step().loss for _ in range(self.run.total_steps)]
            trainer.wait_for_signal()
        return {name: value.tobytes() for name, value in final_weights(trainer).items()}, losses


@pytest.fixture(scope="module")
def base(tiny: TinyFactory) -> BaseModel:
    return tiny(blocks=BLOCKS).base


@pytest.fixture(scope="module")
def devices(tiny: TinyFactory) -> list[Device]:
    """Two that differ in all that a device may choose."""
    bundle = tiny(blocks=BLOCKS, head_dtype="fp32").bundle
    plain = config(total_steps=STEPS, rank=4, wire_dtype="fp32")
    other = config(
        total_steps=STEPS, rank=2, wire_dtype="fp16", seed=(9,), kill_revive=KILLING, target_modules=("all-linear",)
    )
    return [Device(bundle, plain, 0), Device(bundle, other, 1)]


@pytest.fixture(scope="module")
def alone(base: BaseModel, devices: list[Device]) -> list[tuple[dict[str, bytes], list[float]]]:
    results = []
    for device in devices:
        with serving(base) as server:
            results.append(device.train(server.url))
    return results


def train_at_once(url: str, devices: list[Device]) -> list[tuple[dict[str, bytes], list[float]]]:
    ready = threading.Barrier(len(devices))
    with ThreadPoolExecutor(len(devices)) as threads:
        return [each.result(120) for each in [threads.submit(device.train, url, ready) for device in devices]]


@pytest.mark.parametrize("which", [[1], [0, 1], [0, 0, 0]], ids=["again", "two at once", "equal ones at once"])
def test_devices_get_the_same_bits_as_alone(
    base: BaseModel, devices: list[Device], alone: list[object], which: list[int]
) -> None:
    with serving(base) as server:
        assert train_at_once(server.url, [devices[each] for each in which]) == [alone[each] for each in which]


# -- a third one that misbehaves -------------------------------------------------------------------------


def open_session(base: BaseModel) -> m.OpenSession:
    return conversations.open_session(
        base_fingerprint=base.fingerprint,
        groups=base.groups([name for name in base.targets if name.endswith(("q_proj", "down_proj"))]),
        kill_revive=KillReviveConfig(active_fraction=1.0),
    )


def embeddings(tokens: int) -> m.Embeddings:
    return conversations.embeddings_of([WIDTH] * (tokens // WIDTH), 16)


@contextmanager
def stalled_in_forward(url: str, base: BaseModel) -> Iterator[None]:
    """Connected and silent after it was asked for its deltas."""
    with Connection(url) as connection:
        connection.open(open_session(base))
        connection.send(embeddings(WIDTH))
        connection.receive(m.GroupInput)
        yield


@contextmanager
def stalled_in_backward(url: str, base: BaseModel) -> Iterator[None]:
    """Silent when it owes the gradient of the loss."""
    with Connection(url) as connection:
        connection.open(open_session(base))
        connection.send(embeddings(WIDTH))
        while isinstance(message := connection.receive_any(), m.GroupInput):
            connection.send(deltas(base, message.groups[0], WIDTH))
        yield


def deltas(base: BaseModel, group: int, tokens: int) -> m.GroupDelta:
    targets = open_session(base).groups[group].targets
    zeros = tuple(encode_floats(np.zeros((tokens, target.out_features), np.float32), "fp32") for target in targets)
    return m.GroupDelta(step=0, micro_batch=0, groups=(group,), deltas=zeros)


@contextmanager
def never_reading(url: str, base: BaseModel) -> Iterator[None]:
    """Answers as the rules say without reading a byte, until what the server sends it fills every buffer."""
    host, port = url.removeprefix("ws://").split(":")
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect((host, int(port)))
    tokens = GLUTTONS_TOKENS
    settings = {"compression": None, "proxy": None, "max_queue": 1, "max_size": None, "close_timeout": 0.1}
    with connect(url, sock=raw, **settings) as websocket:  # type: ignore[arg-type]
        for message in (m.Hello(protocol_versions=list(PROTOCOL_VERSIONS), software="a glutton"), open_session(base)):
            websocket.send(encode(message))
            websocket.recv()
        websocket.send(encode(embeddings(tokens), seq=1))
        # The client library reads two frames ahead on its own; the third one stays with the server.
        for group in range(5):
            websocket.send(encode(deltas(base, group, tokens), seq=2 + group))
        time.sleep(0.2)
        yield
        # Reset, so that nothing waits for a goodbye.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("stall", [stalled_in_forward, stalled_in_backward, never_reading])
def test_stalled_device_changes_no_bit_of_others(
    base: BaseModel, devices: list[Device], alone: list[object], stall: object
) -> None:
    with serving(base, max_tokens=GLUTTONS_TOKENS, timeouts=SessionTimeouts(park_s=0)) as server:
        with stall(server.url, base):  # type: ignore[operator]
            assert train_at_once(server.url, devices) == alone
            eventually(lambda: server.server.health()["sessions"] == 1)
        eventually(lambda: server.server.health()["sessions"] == 0)


def test_a_step_leaves_no_graph_behind(base: BaseModel, devices: list[Device]) -> None:
    """Exchange and autograd graph hold each other; a cycle through C++ would leak every step's activations."""
    import gc
    import weakref

    from dlora.cloud.exchange import exchange

    made: list[weakref.ref[exchange.MicroBatchExchange]] = []
    original = exchange.MicroBatchExchange.__init__

    def remember(self: exchange.MicroBatchExchange, *arguments: object, **settings: object) -> None:
        original(self, *arguments, **settings)  # type: ignore[arg-type]
        made.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange.MicroBatchExchange, "__init__", remember)
        dataset = random_dataset(VOCABULARY)
        with serving(base) as server, training(devices[0].bundle, server.url, config(), dataset) as trainer:
            for _ in range(4):
                trainer.run_step()
            trainer.wait_for_signal()
            gc.collect()
            alive = [ref for ref in made if ref() is not None]
    assert len(made) == 4
    assert not alive


def test_locked_token_file_delays_no_session(
    base: BaseModel, devices: list[Device], alone: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the look at the tokens of running sessions nor a device that comes: the event loop never waits for it."""
    tokens = BearerTokenStore(tmp_path / "tokens.sqlite")
    token = tokens.create("phone", None)
    used_by: set[str] = set()
    opened = BearerTokenStore._open

    def watched(store: BearerTokenStore) -> AbstractContextManager[sqlite3.Connection]:
        used_by.add(threading.current_thread().name.rstrip("0123456789"))
        return opened(store)

    monkeypatch.setattr(BearerTokenStore, "_open", watched)
    monkeypatch.setattr(cloud_server, "RECHECK_EVERY_S", 0.01)
    monkeypatch.setattr(cloud_tokens, "LOCK_TIMEOUT_S", 0.1)
    device, connecting = devices[0], ConnectSettings(credentials=Credentials(token=token))
    data = random_dataset(VOCABULARY, seed=device.data_seed)
    with (
        serving(base, access=Access(tokens, required=True)) as server,
        training(device.bundle, server.url, device.run, data, connecting) as trainer,
    ):
        with closing(sqlite3.connect(tokens.path)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(InvalidStatus) as refused:
                connect(server.url, proxy=None, additional_headers={"Authorization": f"Bearer {token}"})
            assert refused.value.response.status_code == 503
            losses = [trainer.run_step().loss for _ in range(device.run.total_steps)]
            trainer.wait_for_signal()
        weights = {name: value.tobytes() for name, value in final_weights(trainer).items()}
    assert (weights, losses) == alone[0]
    assert used_by == {"asyncio_"}  # to_thread's
