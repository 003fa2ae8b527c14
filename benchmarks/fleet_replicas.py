"""Eight devices at two replicas behind HAProxy, which loses tunnels and servers while they train: a part of fleet.py.

Each device's adapter is held, byte for byte, against the one that it trains alone with one server and no proxy.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bars import Entry, at_least, at_most
from children import log

_TESTS = Path(__file__).resolve().parents[1] / "tests"
_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path[:0] = [str(_TESTS / "faults"), str(_TESTS), str(_EXAMPLES)]

from dialogue import write_dialogue  # noqa: E402
from fault_run import Place, Replicas, make_place, replicas, start_device  # noqa: E402
from forked import Command, spawn_command  # noqa: E402
from haproxies import Haproxy, haproxy  # noqa: E402

from dlora.edge.adapters.peft import WEIGHTS_NAME  # noqa: E402
from dlora.edge.run.file_names import METRICS, SUMMARY  # noqa: E402

WAYS: Final = {"live": "live", "passes": "2,2"}
DEVICES: Final = 8
CUTS: Final = 4
LONG_S: Final = 3600.0
SERVER: Final = ("--trusted-proxy", "127.0.0.1", "--max-sessions", 2 * DEVICES, "--drain-s", 120, "--park-s", 600)


@dataclass(frozen=True)
class Case:
    """What is trained: how, and how many steps a device."""

    name: str
    place: Place
    options: tuple[object, ...]
    steps: int


def cases(directory: Path, names: Sequence[str], bundle: Path) -> list[Case]:
    """``tiny``, ``live`` and ``passes``: a tiny model, and the default of SmolLM2-135M in both ways."""
    found = []
    for name in names:
        if name == "tiny":
            found.append(Case(name, make_place(directory / name, "bottleneck"), (), 40))
            continue
        (directory / name).mkdir()
        data, _ = write_dialogue(directory / name, 64, 0)
        train = ("--batch-size", 4, "--threads", 1)
        place = Place(directory / name, train, "smollm2-135m", bundle, spawn_command)
        place.data.write_text("".join(data.read_text().splitlines(keepends=True)[:96]))
        found.append(Case(name, place, ("--passes", WAYS[name]), 12))
    return found


def measure(case: Case, directory: Path) -> dict[str, Any]:
    """Train alone, then all together with everything that happens to a fleet."""
    with replicas(case.place, directory / "alone", SERVER, count=1) as one:
        alone = [start_case(case, directory / f"alone-{n}", one.url(0), n) for n in range(DEVICES)]
        for device in alone:
            end_device(device)
    log(f"{case.name}: {DEVICES} alone")
    with (
        replicas(case.place, directory / "replicas", SERVER) as running,
        haproxy([running.url(0), running.url(1)], directory) as proxy,
    ):
        outs = [directory / f"device-{n}" for n in range(DEVICES)]
        devices = [start_case(case, out, proxy.url, n) for n, out in enumerate(outs)]
        happened = _disturb(case, outs, devices, running, proxy)
        for device in devices:
            end_device(device)
    summaries = [json.loads((out / SUMMARY).read_text()) for out in outs]
    return {
        **happened,
        "devices": DEVICES,
        "steps": case.steps,
        "as_alone": sum(
            (out / WEIGHTS_NAME).read_bytes() == (directory / f"alone-{n}" / WEIGHTS_NAME).read_bytes()
            for n, out in enumerate(outs)
        ),
        "came_back": sum(summary["sessions_resumed"] for summary in summaries),
        "steps_rerun": [summary["steps_rerun"] for summary in summaries],
        "reconnects": [summary["reconnects"] for summary in summaries],
    }


def bars(case: str, found: dict[str, Any], command: str) -> dict[str, Entry]:
    """The first of the issue's."""
    return {
        f"replicas, {case}: adapters that are those of a device alone, of 8": at_least(8, found["as_alone"], command),
        f"replicas, {case}: came back to their session, of 32": at_least(32, found["came_back"], command),
        f"replicas, {case}: most steps run again by a device, two servers lost": at_most(
            2, max(found["steps_rerun"]), command
        ),
        f"replicas, {case}: devices at the fuller server, of 8": at_most(4, max(found["spread"]), command),
    }


def start_case(case: Case, out: Path, url: str, number: int) -> Command:
    """A device that trains as the case says; ``number``: its seed."""
    options = (*case.options, "--steps", case.steps, "--seed", number, "--max-retry-s", 600)
    return start_device(case.place, out, url, options)


def end_device(device: Command) -> None:
    """Wait for the end, which must be a good one."""
    if code := device.end(LONG_S):
        raise SystemExit(f"error: a device ended with {code}: {device.last_line()}")


def _disturb(
    case: Case, outs: Sequence[Path], devices: Sequence[Command], running: Replicas, proxy: Haproxy
) -> dict[str, Any]:
    """Cut all tunnels four times, kill a server, and let the other one drain: each once all devices have gone on."""
    events = CUTS + 2
    _wait_for_steps(outs, devices, 1)
    spread = proxy.connections()
    for event in range(events):
        _wait_for_steps(outs, devices, 1 + (case.steps - 2) * event // events)
        if event < CUTS:
            log(f"{case.name}: cut {event + 1}, {proxy.connections()}")
            for replica in (1, 2):
                proxy.cut(replica)
            continue
        log(f"{case.name}: {('a server killed', 'a server drains')[event - CUTS]}, {proxy.connections()}")
        number = (signal.SIGKILL, signal.SIGTERM)[event - CUTS]
        restarting = threading.Thread(target=running.restart, args=(event - CUTS, number))
        restarting.start()
        restarting.join()
    return {"spread": spread}


def _wait_for_steps(outs: Sequence[Path], devices: Sequence[Command], steps: int) -> None:
    """Until every device has done so many."""
    until = time.monotonic() + LONG_S
    while min(steps_done(out) for out in outs) < steps:
        check_devices(devices)
        if time.monotonic() > until:
            raise SystemExit("error: the devices stand still")
        time.sleep(0.05)


def check_devices(devices: Sequence[Command]) -> None:
    """None of them may have failed so far."""
    for device in devices:
        if device.wait(0):
            raise SystemExit(f"error: a device ended: {device.last_line()}")


def steps_done(out: Path) -> int:
    """Of the run in ``out``, so far."""
    metrics = out / METRICS
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0
