"""Many devices, random faults, for minutes: nothing is lost, nothing is done twice, and the server does not grow.

    python benchmarks/soak.py --devices 8 --minutes 10 --fault-every-s 5

Every device trains a tiny model over and over, in processes of its own, through a proxy of its own, and each run is
held bit by bit against one that nothing disturbed. There are two servers with the same key. B is killed and restarted
now and then; A never is, and is measured: memory, threads, open files, sessions. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from children import log

_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(_TESTS / "faults"), str(_TESTS)]

from fault_proxy import Fault  # noqa: E402
from fault_run import LONG_S, FaultRun, Place, Reference, Replicas, compare, make_place, record, replicas  # noqa: E402
from forked import fork_command, spawn_command  # noqa: E402

A, B = 0, 1
SEEDS = 4
PARK_S = 10
SAMPLE_EVERY_S = 2.0
DEVICE = ("--set", "server.exchange_timeout_s=2", "--max-retry-s", 600)
SERVER = ("--exchange-timeout-s", 2, "--park-s", PARK_S, "--drain-s", 5, "--max-sessions", 64)
ON_A_DEVICE = (
    Fault.KILL_DEVICE, Fault.CUT_LINK, Fault.HALF_OPEN, Fault.CORRUPT, Fault.TRUNCATE, Fault.DUPLICATE, Fault.DELAY,
    Fault.SWAP_REPLICA,
)  # fmt: skip
FAULTS = (*ON_A_DEVICE, Fault.KILL_SERVER, Fault.RESTART_SERVER)


@dataclass
class Tally:
    """What happened, counted from several threads."""

    runs: int = 0
    steps: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    recoveries: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Device:
    """One device: run after run until asked to stop; it says what it does at the moment."""

    def __init__(
        self, number: int, place: Place, running: Replicas, references: list[Reference], tally: Tally, steps: int
    ) -> None:
        self.fault_run: FaultRun | None = None
        self._number = number
        self._place = place
        self._running = running
        self._references = references
        self._tally = tally
        self._steps = steps

    def work(self, stop: threading.Event) -> None:
        for run in itertools.count():
            if stop.is_set():
                return
            try:
                self._train(run)
            except Exception:
                with self._tally.lock:
                    self._tally.wrong.append(traceback.format_exc(limit=3))

    def _train(self, run: int) -> None:
        seed = (self._number + run) % SEEDS
        out = self._place.directory / f"device-{self._number}" / f"run-{run}" / "out"
        # It starts at A or B, and may be moved.
        self.fault_run = FaultRun(
            self._place, self._running, out, (*DEVICE, "--seed", seed), seed=run, at=(self._number + run) % 2,
            most_restarts=1000, timeout_s=LONG_S,
        )  # fmt: skip
        outcome = self.fault_run.run()
        fault_run, self.fault_run = self.fault_run, None
        if not outcome.wrong:
            compare(outcome, out, self._references[seed].out, fault_run.proxy.reports)
        with self._tally.lock:
            self._tally.runs += 1
            self._tally.steps += self._steps * (not outcome.wrong)
            self._tally.lost += outcome.steps_lost
            self._tally.doubled += outcome.steps_doubled
            self._tally.wrong += [f"device {self._number}, run {run}: {each}" for each in outcome.wrong]
            self._tally.faults.update(fault.name.lower() for fault in fault_run.proxy.done)
            self._tally.recoveries[outcome.recovery] += 1


@dataclass(frozen=True)
class Sample:
    """Server A at a moment, and seconds since the start."""

    at_s: float
    rss_mb: float
    threads: int
    open_files: int
    sessions: int


def main() -> None:
    """Exit with 1 where anything was lost, done twice, or differs."""
    options = _options()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, _world(Path(name), options) as (place, running):
        log("training every seed without a disturbance")
        references = [
            record(place, running, place.directory / f"plain-{seed}" / "out", (*DEVICE, "--seed", seed), watch=False)
            for seed in range(SEEDS)
        ]
        server = psutil.Process(running.servers[A].pid)
        samples = [_sample(server, running, 0.0)]
        tally, stop = Tally(), threading.Event()
        devices = [Device(n, place, running, references, tally, options.steps) for n in range(options.devices)]
        threads = [threading.Thread(target=device.work, args=(stop,), daemon=True) for device in devices]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        chaos = threading.Thread(target=_do_harm, args=(devices, running, tally, stop, options), daemon=True)
        chaos.start()
        while (now := time.monotonic() - began) < options.minutes * 60:
            time.sleep(SAMPLE_EVERY_S)
            samples.append(_sample(server, running, now))
            if len(samples) % 15 == 0:
                last = samples[-1]
                log(
                    f"{now:.0f} s: {tally.steps} steps, {sum(tally.faults.values())} faults, {len(tally.wrong)} wrong; "
                    f"A: {last.rss_mb:.1f} MB, {last.threads} threads, {last.open_files} files"
                )
        stop.set()
        for thread in (chaos, *threads):
            thread.join(120)
        log("all devices are done; waiting for what is parked to be given up")
        time.sleep(PARK_S + 2)
        end = _sample(server, running, time.monotonic() - began)
        left = [running.health(server)["sessions"] for server in (A, B)]
    result = _result(tally, samples, end, left, options) | {"wall_s": round(time.monotonic() - started, 1)}
    print(json.dumps(result, indent=1))
    if tally.wrong or tally.lost or tally.doubled or any(left):
        raise SystemExit(1)


@contextlib.contextmanager
def _world(directory: Path, options: argparse.Namespace) -> Iterator[tuple[Place, Replicas]]:
    made = make_place(directory)
    train = ["--steps", options.steps, *made.train[made.train.index("--save-every") :]]
    place = replace(made, train=("--batch-size", 2, "--grad-accum", 2, *train))
    # The servers are started as users start them; the devices are forked, or starting Python would be all they do.
    with replicas(replace(place, start=spawn_command), directory / "servers", SERVER) as running:
        yield replace(place, start=fork_command), running


def _do_harm(
    devices: list[Device], running: Replicas, tally: Tally, stop: threading.Event, options: argparse.Namespace
) -> None:
    """A random fault to a random device that trains, or to B, until asked to stop."""
    chance = random.Random(options.seed)
    on_b = threading.Thread()
    while not stop.wait(options.fault_every_s):
        fault = chance.choice(ON_A_DEVICE if on_b.is_alive() else FAULTS)
        runs = [fault_run for device in devices if (fault_run := device.fault_run) is not None]
        if fault in (Fault.KILL_SERVER, Fault.RESTART_SERVER):
            with tally.lock:
                tally.faults[fault.name.lower()] += 1
            on_b = threading.Thread(target=running.kill if fault is Fault.KILL_SERVER else running.restart, args=(B,))
            on_b.start()
        elif runs:
            chance.choice(runs).proxy.do_fault(fault)
    if on_b.ident is not None:
        on_b.join()


def _sample(server: psutil.Process, running: Replicas, at_s: float) -> Sample:
    sessions = running.health(A)["sessions"]
    with server.oneshot():
        return Sample(at_s, server.memory_info().rss / 1e6, server.num_threads(), server.num_fds(), sessions)


def _result(
    tally: Tally, samples: list[Sample], end: Sample, left: list[int], options: argparse.Namespace
) -> dict[str, Any]:
    warm = [sample for sample in samples if sample.at_s >= 60 * options.minutes * options.warm_up]
    minutes, rss = (np.array([getattr(each, name) for each in warm]) for name in ("at_s", "rss_mb"))
    slope = float(np.polyfit(minutes / 60, rss, 1)[0]) if len(warm) > 2 else float("nan")
    return {
        "devices": options.devices,
        "minutes": options.minutes,
        "steps": tally.steps,
        "runs": tally.runs,
        "faults": sum(tally.faults.values()),
        "faults_by_kind": dict(sorted(tally.faults.items())),
        "recoveries": dict(sorted(tally.recoveries.items())),
        "steps_lost": tally.lost,
        "steps_doubled": tally.doubled,
        "bit_equal": not tally.wrong,
        "wrong": tally.wrong[:20],
        "server_rss_slope_mb_per_min": round(slope, 3),
        "server_rss_mb": {"warm": round(warm[0].rss_mb, 1), "end": round(end.rss_mb, 1)},
        "open_files": _growth([sample.open_files for sample in (*samples, end)]),
        "threads": _growth([sample.threads for sample in (*samples, end)]),
        "sessions_left": sum(left),
    }


def _growth(counts: list[int]) -> dict[str, int]:
    return {"start": counts[0], "most": max(counts), "end": counts[-1]}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--fault-every-s", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--warm-up", type=float, default=0.2, help="share of the time before memory is measured")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
