"""Many light devices in one process, for fleet_devices.py: each a real run with a connection of its own, which thinks
between its steps and whose network is away now and then. Answers each JSON line on stdin, which may change how they
spend their time, with what they have done so far.
"""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import sys
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from websockets.sync.client import ClientConnection, connect

_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(_TESTS)]

from families import VOCABULARY  # noqa: E402
from serving import config, random_dataset  # noqa: E402

from dlora.edge.data.examples import Dataset  # noqa: E402
from dlora.edge.engine import onnx_engine  # noqa: E402
from dlora.edge.engine.bundle import Bundle  # noqa: E402
from dlora.edge.engine.engine import Graph  # noqa: E402
from dlora.edge.engine.onnx_engine import OnnxEngine  # noqa: E402
from dlora.edge.training.side import ServerSide  # noqa: E402
from dlora.edge.training.trainer import Trainer  # noqa: E402
from dlora.edge.wire import connecting, connection  # noqa: E402
from dlora.edge.wire.connecting import ConnectSettings, Retry  # noqa: E402
from dlora.edge.wire.connection import Connection  # noqa: E402
from dlora.edge.wire.credentials import Credentials  # noqa: E402
from dlora.protocol.connections import raise_file_limit  # noqa: E402
from dlora.protocol.manifest import GraphKind  # noqa: E402

NEVER: Final = 10**6
"""Steps of a run: more than there is time for."""
AT_ONCE: Final = 4
"""Devices that begin at a time: a fleet does not come all at once."""
TICK_S: Final = 0.1
STOP_CHECK_S: Final = 5.0
"""While it waits for a server, a device looks five times a second whether somebody asked it to stop. On a device of its
own that is nothing; of a thousand on one machine, most of which wait, it is half a core."""


@dataclass
class Weather:
    """How devices spend their time, and how often their network is away; all in seconds, means of exponential times.

    Attributes:
        outage_every_s: of one device; 0: never.
    """

    think_s: float = 1.0
    outage_every_s: float = 0.0
    outage_s: float = 0.0


class SharedEngine(OnnxEngine):
    """Loads each graph once for all devices of this process."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, 1)
        self._lock = threading.Lock()
        self._loaded: dict[tuple[GraphKind, str], Graph] = {}

    def load(self, kind: GraphKind, key: str = "") -> Graph:
        with self._lock:
            if (kind, key) not in self._loaded:
                self._loaded[kind, key] = super().load(kind, key)
            return self._loaded[kind, key]


class LightDevice(threading.Thread):
    """One device, from its first connection on.

    Attributes:
        steps, outages: how many so far; is_ready: whether it has begun; error: what ended it, which nothing may.
    """

    def __init__(self, number: int, token: str, url: str, bundle: Bundle, engine: SharedEngine, data: Dataset) -> None:
        super().__init__(daemon=True)
        self.steps = self.outages = 0
        self.is_ready = False
        self.error: Exception | None = None
        self.weather = Weather()
        self.connection: Connection | None = None
        self.number, self._bundle, self._engine, self._data = number, bundle, engine, data
        self._url = url
        self._settings = ConnectSettings(Credentials(token), f"device-{number}", Retry(max_s=None, at_start=True))
        self._rng = random.Random(number)
        self._websocket: ClientConnection | None = None
        self._away_until = 0.0

    def run(self) -> None:
        _here.device = self
        try:
            self._train()
        except Exception as error:
            self.error = error

    def connect(self, url: str, **options: Any) -> ClientConnection:
        """Websockets' own, where there is a network."""
        if time.monotonic() < self._away_until:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")
        self._websocket = connect(url, **options)
        return self._websocket

    def lose_network(self) -> None:
        """For a while."""
        self._away_until = time.monotonic() + self._rng.expovariate(1 / self.weather.outage_s)
        if self._websocket is not None:
            self.outages += 1
            with suppress(OSError):  # it is away already
                self._websocket.socket.shutdown(socket.SHUT_RDWR)

    def _train(self) -> None:
        with _beginning:
            self.connection = Connection(self._url, self._settings)
            run = config(total_steps=NEVER, kind="bottleneck", basis_steps=1, wire_dtype="int8", seed=(self.number,))
            make_side = partial(ServerSide, connection=self.connection)
            trainer = Trainer(self._bundle, self._engine, make_side, run, self._data)
        self.is_ready = True
        while True:
            self._think()
            trainer.run_step()
            self.steps += 1

    def _think(self) -> None:
        """Looks at the weather each second, so that it can change."""
        left = self._rng.expovariate(1.0)
        while left > 0:
            think_s = self.weather.think_s
            time.sleep(min(left * think_s, 1.0))
            left -= 1.0 / think_s


_here = threading.local()
_beginning = threading.BoundedSemaphore(AT_ONCE)


def main() -> None:
    """Arguments: the bundle, the server's address, a file of tokens, a device a line, and which of its lines."""
    bundle_path, url, tokens, first, last = sys.argv[1:]
    raise_file_limit()
    bundle = Bundle.open(Path(bundle_path))
    engine, data = SharedEngine(bundle), random_dataset(VOCABULARY)
    lines = Path(tokens).read_text().split()
    devices = [LightDevice(n, lines[n], url, bundle, engine, data) for n in range(int(first), int(last))]
    with (
        patch.object(connecting, "connect", lambda url, **options: _here.device.connect(url, **options)),
        patch.object(connection, "STOP_CHECK_S", STOP_CHECK_S),
        patch.object(onnx_engine, "limit_memory", nullcontext),  # the limit is the process's, and threads share it
    ):
        for device in devices:
            device.start()
        threading.Thread(target=_make_weather, args=(devices,), daemon=True).start()
        for line in sys.stdin:
            if asked := json.loads(line):
                weather = Weather(**asked)
                for device in devices:
                    device.weather = weather
            print(json.dumps(_counted(devices)), flush=True)
    os._exit(0)  # with threads in the middle of a step, Python's own end aborts


def _make_weather(devices: list[LightDevice]) -> None:
    rng = random.Random(devices[0].number)
    while True:
        time.sleep(TICK_S)
        for device in devices:
            every_s = device.weather.outage_every_s
            if every_s and rng.random() < TICK_S / every_s:
                device.lose_network()


def _counted(devices: list[LightDevice]) -> dict[str, Any]:
    connections = [device.connection for device in devices if device.connection is not None]
    return {
        "ready": sum(device.is_ready for device in devices),
        "steps": sum(device.steps for device in devices),
        "each": [device.steps for device in devices],
        "outages": sum(device.outages for device in devices),
        "reconnects": sum(connection.reconnects for connection in connections),
        "resumed": sum(connection.resumed for connection in connections),
        "bytes": sum(sum(each.counters[:2]) for each in connections),
        "round_trips": sum(each.counters[2] for each in connections),
        "errors": [f"{type(device.error).__name__}: {device.error}" for device in devices if device.error is not None],
    }


if __name__ == "__main__":
    main()
