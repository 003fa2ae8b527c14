"""A real server on a loopback port, in a thread of the test's process; and devices to talk to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import conversations
import msgspec
import numpy as np
import pytest
from waiting import loop_in_thread
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.serving.server import CloudServer, ServerSettings
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.kept_reads import KeptReads
from dlora.edge.model.opening import Opening, open_to_generate
from dlora.edge.settings import Training
from dlora.edge.training.resolved import ChosenAdapter, ChosenOptimizer, ChosenServer, Resolved
from dlora.edge.training.side import ServerSide
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.connection import Connection
from dlora.protocol import messages as m
from dlora.protocol.choices import Send
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.session import Session
from dlora.protocol.states import Side

KEY = bytes(range(32))


class RunningServer:
    """Where a server listens, and the server."""

    def __init__(self, url: str, server: CloudServer) -> None:
        self.url = url
        self.server = server


@contextmanager
def serving(base: BaseModel, **settings: Any) -> Iterator[RunningServer]:
    """Serve a base model until the context ends."""
    door = {
        name: settings.pop(name) for name in ("ticket_key", "access", "proxies", "ledger", "tls") if name in settings
    }
    common = {"max_sessions": 8, "max_tokens": 4096, "threads": 1, "drain_s": 0.2}
    server = CloudServer(base, ServerSettings(**{**common, **settings}), **{"ticket_key": KEY, **door})
    with loop_in_thread() as run:
        try:
            run(server.start("127.0.0.1", 0))
            yield RunningServer(f"ws://127.0.0.1:{server.port}", server)
        finally:
            # After a failure too: a session's thread that waits for its device would keep the test run from ending.
            run(server.stop())


class RawDevice:
    """A device that says what it likes; ``session`` lets it be right where it wants to."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.session = Session(Side.EDGE)

    def say(self, *messages: m.AnyMessage) -> None:
        for message in messages:
            self.socket.send(self.session.send(message))

    def hear(self) -> m.AnyMessage:
        return self.session.receive(self.socket.recv(timeout=120, decode=False))

    def hear_error(self) -> m.Error:
        """The server's last message, after which it hangs up."""
        message = self.hear()
        assert isinstance(message, m.Error)
        with pytest.raises(ConnectionClosed):
            self.socket.recv(timeout=120)
        return message


@contextmanager
def raw_device(url: str) -> Iterator[RawDevice]:
    with connect(url, compression=None, proxy=None) as socket:
        yield RawDevice(socket)


@contextmanager
def greeted_device(url: str, token: str = "") -> Iterator[RawDevice]:
    """A raw device that was let in, with a bearer token or without, and has been told of the server."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with connect(url, compression=None, proxy=None, additional_headers=headers) as socket:
        device = RawDevice(socket)
        device.say(conversations.hello())
        assert isinstance(device.hear(), m.Welcome)
        yield device


def random_dataset(vocabulary: int, examples: int = 12, seed: int = 0, longest: int = 9) -> Dataset:
    """Examples of different lengths; about half of their tokens are labels."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(examples):
        length = int(rng.integers(3, longest + 1))
        ids = rng.integers(3, vocabulary, length)
        first = int(rng.integers(0, length - 1))
        made.append((ids.tolist(), list(range(first, length - 1))))
    return Dataset.of(made)


def config(
    *,
    kill_revive: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    blocks: Sequence[int] = (),
    target_modules: Sequence[str] = (),
    lora_alpha: float = 8.0,
    batch_size: int = 3,
    grad_accum: int = 1,
    wire_dtype: str = "fp32",
    send: Send = "embeddings",
    passes: str = "live",
    window: str = "1",
    is_local: bool = False,
    **changes: Any,
) -> Resolved:
    """A short run, all active, on an exact wire.

    ``kill_revive``: fields of ``KillReviveConfig``; ``optimizer``: of its section; other ``changes``: of the section
    ``adapter``, or of ``Resolved`` itself. ``is_local``: whether the device's blocks are all that there are.
    """
    adapter: dict[str, Any] = {"kind": "lora", "rank": 4}
    adapter |= {name: changes.pop(name) for name in list(changes) if name in ChosenAdapter.__struct_fields__}
    if adapter["kind"] == "bottleneck":
        adapter = {"basis": "data", "basis_steps": 8, **adapter}
    device_blocks = changes.get("device_blocks", 0)
    units = {"active_fraction": 1.0, "score": "grad", **(kill_revive or {})}
    return Resolved(
        adapter=ChosenAdapter(
            **adapter,
            alpha=lora_alpha,
            target_modules=",".join(target_modules),
            blocks=",".join(map(str, blocks)),
        ),
        optimizer=ChosenOptimizer(**{"lr": 1e-2, "schedule": "constant", "warmup": 0.0, **(optimizer or {})}),
        training=Training(batch_size=batch_size, grad_accum=grad_accum),
        server=ChosenServer(wire_dtype=wire_dtype, send=send, passes=passes, window=window),
        units=KillReviveConfig(**units),
        blocks=device_blocks if is_local else device_blocks + 1,
        **{"total_steps": 6, "seed": (3,), **changes},
    )


@contextmanager
def training(
    bundle: Path,
    url: str,
    run: Resolved,
    dataset: Dataset,
    connecting: ConnectSettings | None = None,
    kept_reads: KeptReads | None = None,
    **settings: Any,
) -> Iterator[Trainer]:
    """A device's trainer, connected; by default it gives up on the first failure."""
    opened = Bundle.open(bundle)
    if "window" in settings:
        run = msgspec.structs.replace(
            run, server=msgspec.structs.replace(run.server, window=str(settings.pop("window")))
        )
    with Connection(url, connecting) as connection:
        make_side = partial(ServerSide, connection=connection, kept_reads=kept_reads)
        yield Trainer(opened, OnnxEngine(opened, 1), make_side, run, dataset, **settings)


@contextmanager
def served_training(
    base: BaseModel,
    bundle: Path,
    run: Resolved,
    dataset: Dataset,
    connecting: ConnectSettings | None = None,
    **settings: Any,
) -> Iterator[Trainer]:
    """A device's trainer at a server of its own, with these ``settings``."""
    with serving(base, **settings) as server, training(bundle, server.url, run, dataset, connecting) as trainer:
        yield trainer


def open_model(
    bundle: Bundle, url: str | None, adapter: Path | None, *, context_length: int = 0, **changes: Any
) -> AbstractContextManager[Any]:
    """A saved adapter, or none, by default with all blocks on a server; ``changes``: of ``Opening``."""
    return open_to_generate(Opening(bundle, url, adapter, **changes), context_length=context_length)


def final_weights(trainer: Trainer) -> dict[str, np.ndarray]:
    """Every adapter's A and B, by name."""
    return {name.replace(".lora_", "."): parameter.value for name, parameter in trainer.adapters.parameters().items()}


def randomize(trainer: Trainer, seed: int = 5) -> None:
    """B other than zero, so that every gradient shows."""
    randomize_all(trainer, seed, ending=".lora_B")


def randomize_all(trainer: Trainer, seed: int = 0, ending: str = "") -> None:
    """What is trained, of any kind, away from zero, so that every gradient shows; or what has names that end so."""
    rng = np.random.default_rng(seed)
    for name, parameter in trainer.adapters.parameters().items():
        if name.endswith(ending):
            module, _, what = name.rpartition(".")
            gain = trainer.adapters.gains[module] if what == "core" else parameter.gain
            parameter.value = rng.normal(0, 0.3 / gain, parameter.value.shape).astype(np.float32)
