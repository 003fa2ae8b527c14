"""What an honest device notices of the whole hostile suite beside it: its step time with and without, in one run.

Blocks of attacked and of quiet steps take turns (A B B A …), so that both see the same machine. Printed is the ratio
of the medians; ``bit_equal`` compares the adapter with that of an undisturbed run of as many steps.

In an attacked block the attacker holds 10,000 idle connections (made before the clock runs, from several loopback
addresses, as one has too few ports), opens ``--connections-per-s`` more, commits ``--abuses-per-s`` of
tests/attacks/abuses.py in turn, and holds every idle attack, those with sessions too. It is a process of its own,
at normal priority, but its rates are bounded: on the server's own cores an unbounded one would measure how the kernel
divides CPU time among those who want it, which no server decides. What an abuse costs it is measured all the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from children import QUIET_THREADS, Worker, cloud_server, log, need_bundle

os.environ.update({key: os.environ.get(key, value) for key, value in QUIET_THREADS.items()})
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "attacks"))

from abuses import ABUSES, IDLE_ATTACKS, IDLE_ATTACKS_IN_A_SESSION, Target, idle_connections

from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.settings import Settings
from dlora.edge.training.resolve import resolve_without_data
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connection import Connection
from dlora.protocol.connections import raise_file_limit
from dlora.protocol.targets import choose_groups

SITTING = 20
SITTING_IN_SESSIONS = 2
PORTS_OF_AN_ADDRESS = 5000


def main() -> None:
    """Print one JSON object; the attacker's process is this file with ``--attack``."""
    options = _options()
    if options.attack:
        _attack(options)
        return
    bundle = Bundle.open(need_bundle(options.bundle))
    steps = options.warmup + 4 * options.rounds * options.block
    with cloud_server(options.model, options.threads) as (url, _):
        log(f"an undisturbed run of {steps} steps")
        with Connection(url) as connection:
            trainer = _trainer(bundle, connection, options, steps)
            for _ in range(steps):
                trainer.run_step()
            undisturbed = _bits(trainer)
        attacker = Worker(
            str(Path(__file__)), "--attack", url, "--bundle", str(options.bundle), "--idle", str(options.idle),
            "--connections-per-s", str(options.connections_per_s), "--abuses-per-s", str(options.abuses_per_s),
            *(word for name in options.only for word in ("--only", name)),
        )  # fmt: skip
        times: dict[str, list[float]] = {"quiet": [], "attacked": []}
        outcomes: Counter[str] = Counter()
        opened, rested_s = 0, 0.0
        with Connection(url) as connection:
            trainer = _trainer(bundle, connection, options, steps)
            for _ in range(options.warmup):
                trainer.run_step()
            for kind in ("attacked", "quiet", "quiet", "attacked") * options.rounds:
                began = time.perf_counter()
                if kind == "attacked":
                    attacker.ask({"do": "begin"})
                    rested_s = time.perf_counter() - began
                else:
                    time.sleep(rested_s)  # machines with a CPU allowance are faster after a rest
                for _ in range(options.block):
                    started = time.perf_counter()
                    trainer.run_step()
                    times[kind].append(time.perf_counter() - started)
                if kind == "attacked":
                    found = attacker.ask({"do": "end"})
                    outcomes.update(found["outcomes"])
                    opened += found["connections"]
                log(f"{kind}: {statistics.median(times[kind][-options.block :]):.3f} s a step")
            bits = _bits(trainer)
        attacker.close()
    quiet, attacked = (statistics.median(times[kind]) for kind in ("quiet", "attacked"))
    print(
        json.dumps(
            {
                "model": options.model,
                "steps": {kind: len(found) for kind, found in times.items()},
                "step_s": {"quiet": round(quiet, 4), "attacked": round(attacked, 4)},
                "ratio": round(attacked / quiet, 3),
                "bit_equal": bits == undisturbed,
                "idle_connections": options.idle,
                "connections_opened": opened,
                "abuses": sum(outcomes.values()),
                "abuses_by_outcome": dict(outcomes.most_common()),
            },
            indent=1,
        )
    )


def _trainer(bundle: Bundle, connection: Connection, options: argparse.Namespace, steps: int) -> Trainer:
    rng = np.random.default_rng(0)
    ids = rng.integers(100, bundle.manifest.base_model.vocabulary_size, (32, options.length))
    dataset = Dataset.of([(row.tolist(), list(range(options.length // 2, options.length - 1))) for row in ids])
    settings = Settings.of(
        kind="lora", lr=1e-3, schedule="constant", warmup=0.0, seed=0, steps=steps, batch_size=options.batch_size,
        server="ws://a-server",
    )  # fmt: skip
    config = resolve_without_data(settings, bundle.manifest, None)
    return Trainer(bundle, OnnxEngine(bundle, options.threads), connection, config, dataset)


def _bits(trainer: Trainer) -> list[bytes]:
    return [np.asarray(parameter.value).tobytes() for parameter in trainer.adapters.parameters().values()]


# -- the attacker ----------------------------------------------------------------------------------------


def _attack(options: argparse.Namespace) -> None:
    """Answer ``begin`` (once the idle connections stand) and ``end`` (once nothing is left of them)."""
    raise_file_limit()
    attacker = _Attacker(options)
    for line in sys.stdin:
        match json.loads(line)["do"]:
            case "begin":
                print(json.dumps(attacker.begin()), flush=True)
            case "end":
                print(json.dumps(attacker.end()), flush=True)


class _Attacker:
    """The whole suite at a bounded rate, between ``begin`` and ``end``."""

    def __init__(self, options: argparse.Namespace) -> None:
        groups = choose_groups(Bundle.open(options.bundle).manifest)
        addresses = [f"127.0.0.{2 + number}" for number in range(1 + options.idle // PORTS_OF_AN_ADDRESS)]
        self._targets = itertools.cycle([Target(options.attack, groups, address) for address in addresses])
        self._abuses = itertools.cycle([ABUSES[name] for name in options.only or ABUSES])
        self._options = options
        self._held = ExitStack()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._connections = 0
        self._outcomes: Counter[str] = Counter()

    def begin(self) -> dict[str, object]:
        self._connections = 0
        self._outcomes.clear()
        for _ in range(self._options.idle):
            self._open_one()
        for attacks, count in ((IDLE_ATTACKS, SITTING), (IDLE_ATTACKS_IN_A_SESSION, SITTING_IN_SESSIONS)):
            for make in () if self._options.only else attacks.values():
                self._held.enter_context(idle_connections(next(self._targets), make, count))
        self._stop.clear()
        rates = ((self._open_one, self._options.connections_per_s), (self._abuse_once, self._options.abuses_per_s))
        self._threads = [threading.Thread(target=self._repeat, args=pair, daemon=True) for pair in rates]
        for thread in self._threads:
            thread.start()
        return {}

    def end(self) -> dict[str, object]:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._held.close()
        return {"connections": self._connections, "outcomes": self._outcomes}

    def _repeat(self, what: Callable[[], None], per_s: float) -> None:
        while not self._stop.wait(1 / per_s):
            what()

    def _open_one(self) -> None:
        with suppress(OSError, AssertionError):  # it may be dropped before it stands
            IDLE_ATTACKS["idle_websocket"](next(self._targets), self._held)
            self._connections += 1

    def _abuse_once(self) -> None:
        run, expected = next(self._abuses)
        try:
            outcome = run(next(self._targets))
        except (OSError, AssertionError):
            outcome = "cut short"  # the server is full, or dropped it among the flood's others
        self._outcomes[outcome if outcome in (*expected, "cut short") else f"{run.__name__}: {outcome}"] += 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=2, help="of four blocks each: attacked, quiet, quiet, attacked")
    parser.add_argument("--block", type=int, default=5, help="steps of a block")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--idle", type=int, default=10_000, help="idle connections")
    parser.add_argument("--connections-per-s", type=float, default=20.0)
    parser.add_argument("--abuses-per-s", type=float, default=10.0)
    parser.add_argument("--only", action="append", default=[], choices=ABUSES, metavar="ABUSE", help="only this")
    parser.add_argument("--attack", metavar="URL", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
