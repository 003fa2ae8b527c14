"""What it costs that a session can be resumed, on a run that nothing disturbs: checksums, numbers and the outbox.

One device trains in one session of one server; between steps both switch them off and on again, in the order on, off,
off, on. Off exists here only: the product has no such switch. Prints one JSON object; the ratio is of each round, then
the median, as both halves of a round saw the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from unittest import mock

import numpy as np
from children import QUIET_THREADS, log, need_bundle

os.environ.update({key: os.environ.get(key, value) for key, value in QUIET_THREADS.items()})

from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.settings import Settings
from dlora.edge.training.resolve import resolve_without_data
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connection import Connection
from dlora.protocol import frames
from dlora.protocol.frames import Prefix
from dlora.protocol.link import Link

ON, OFF = signal.SIGUSR1, signal.SIGUSR2


class Switch:
    """Turns checksums, outbox and the check for repeats off and on in this process."""

    def __init__(self) -> None:
        self._off = contextlib.ExitStack()

    def turn(self, on: bool) -> None:
        self._off.close()
        if not on:
            enter = self._off.enter_context
            enter(mock.patch.object(frames, "zlib", SimpleNamespace(crc32=lambda data, start=0: 0)))
            enter(mock.patch.object(Link, "keep", _count))
            enter(mock.patch.object(Link, "is_repeat", _is_new))
            enter(mock.patch.object(Link, "accept", _take))


def _count(link: Link, frame: bytearray) -> None:
    link.sent += 1


def _is_new(link: Link, prefix: Prefix) -> bool:
    return False


def _take(link: Link, prefix: Prefix) -> None:
    link.received = prefix.seq


class Server:
    """A ``dlora-cloud serve`` process that obeys the switch."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.url = url
        self._process = process

    def turn(self, on: bool) -> None:
        """Returns once it has."""
        self._process.send_signal(ON if on else OFF)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{on}\n"


@contextlib.contextmanager
def _server(model: str, threads: int) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as state:
        process = subprocess.Popen(
            [sys.executable, __file__, "--serve", "serve", model, "--port", "0", "--threads", str(threads),
             "--state-dir", state, "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **QUIET_THREADS},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            text = ""
            while not text.rstrip().endswith("}"):
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"error: the server did not start: dlora-cloud serve {model}")
                text += line
            yield Server(process, json.loads(text)["url"])
        finally:
            process.terminate()
            process.wait(60)


def _serve(arguments: list[str]) -> None:
    """``dlora-cloud`` with a switch."""
    from dlora.cloud.__main__ import main as run_cloud

    switch = Switch()

    def turn(number: int, frame: FrameType | None) -> None:
        switch.turn(number == ON)
        print(number == ON, flush=True)

    signal.signal(ON, turn)
    signal.signal(OFF, turn)
    sys.argv = ["dlora-cloud", *arguments]
    run_cloud()


def main() -> None:
    """Print one JSON object."""
    options = _options()
    bundle = Bundle.open(need_bundle(options.bundle))
    rng = np.random.default_rng(0)
    ids = rng.integers(100, bundle.manifest.base_model.vocabulary_size, (8 * options.batch_size, options.length))
    first = options.length * 2 // 3
    dataset = Dataset.of([(row.tolist(), list(range(first - 1, options.length - 1))) for row in ids])
    settings = Settings.of(
        kind="lora", lr=1e-3, schedule="constant", warmup=0.0, seed=0, steps=10_000, batch_size=options.batch_size,
        server="ws://a-server", active_fraction=options.active_fraction,
    )  # fmt: skip
    config = resolve_without_data(settings, bundle.manifest, None)
    switch, times = Switch(), {True: list[float](), False: list[float]()}
    with _server(options.model, options.threads) as server, Connection(server.url) as connection:
        trainer = Trainer(bundle, OnnxEngine(bundle, options.threads), connection, config, dataset)
        for _ in range(options.warmup):
            trainer.run_step()
        for round_ in range(options.rounds):
            for on in (True, False, False, True) if round_ % 2 == 0 else (False, True, True, False):
                trainer.wait_for_signal()  # nothing is under way when the rules change
                switch.turn(on)
                server.turn(on)
                started = time.perf_counter()
                row = trainer.run_step()
                times[on].append(time.perf_counter() - started)
            log(f"round {round_ + 1} of {options.rounds}: on {times[True][-1]:.3f} s, off {times[False][-1]:.3f} s")
        trainer.wait_for_signal()
        switch.turn(on=True)
        server.turn(on=True)
    rounds = [(sum(times[True][at : at + 2]), sum(times[False][at : at + 2])) for at in range(0, 2 * options.rounds, 2)]
    ratio = statistics.median(on / off for on, off in rounds)
    result = {
        "model": options.model,
        "tokens_per_step": options.batch_size * options.length,
        "active_units": row.active_units,
        "bytes_per_step": row.bytes_up + row.bytes_down,
        "rounds": options.rounds,
        "step_s_with": round(statistics.median(times[True]), 4),
        "step_s_without": round(statistics.median(times[False]), 4),
        "ratio": round(ratio, 4),
        "overhead_percent": round(100 * (ratio - 1), 2),
    }
    print(json.dumps(result, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--active-fraction", type=float, default=1.0, help="1: most bytes, so most to keep and check")
    parser.add_argument("--rounds", type=int, default=10, help="of four steps each")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(sys.argv[2:])
    else:
        main()
