"""A thousand light devices at four replicas behind HAProxy, and what a formula says of them: a part of fleet.py.

The formula gets what a step of a few devices takes of processor time when these keep all cores busy, and what a
thousand take that do nothing. It says how many steps a second a thousand do that think for a minute between two, for
about as long as the cores can just follow, and for five seconds, which is more than they can do.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
from bars import Entry, at_least, at_most
from children import cloud_process, cpu_seconds, log, pss_mb, worker
from fleet_model import throughput
from fleet_replicas import LONG_S, haproxy, make_place
from fleet_sessions import read_page
from prometheus_client.parser import text_string_to_metric_families

from dlora.cloud.admission.tokens import FILE_NAME, BearerTokenStore
from dlora.protocol.connections import raise_file_limit

_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(_TESTS / "faults"), str(_TESTS)]

from forked import free_port  # noqa: E402

DEVICES: Final = 1000
FEW: Final = 40
REPLICAS: Final = 4
PROCESSES: Final = 4
"""Of devices, each with as many."""
FEW_THINK_S: Final = 0.1
THINK_S: Final = {"long": 60.0, "medium": 20.0, "short": 5.0}
NEVER_S: Final = 1e6
OUTAGES: Final = {"outage_every_s": 300.0, "outage_s": 5.0}
SETTLE_S: Final = 25.0
WINDOW_S: Final = 60.0
WITHIN_PERCENT: Final = 20.0
LEAST_BUSY: Final = 0.8
EXPECTED: Final = ("busy", "quota_")


@dataclass(frozen=True)
class Fleet:
    """What asks the devices of each process."""

    asks: list[Any]

    def ask(self, weather: dict[str, float] | None = None) -> dict[str, Any]:
        """What all devices have done so far. ``weather``: how they spend their time from now on."""
        with ThreadPoolExecutor(len(self.asks)) as pool:
            answers = list(pool.map(lambda ask: ask(weather or {}), self.asks))
        counted = {name: sum(answer[name] for answer in answers) for name in answers[0] if name not in _LISTS}
        found = counted | {name: [each for answer in answers for each in answer[name]] for name in _LISTS}
        if found["errors"]:
            raise SystemExit(f"error: {len(found['errors'])} devices ended: {found['errors'][0]}")
        return found


_LISTS: Final = ("each", "errors")


def measure(directory: Path) -> dict[str, Any]:
    """Few devices, then a thousand: which do nothing, think long, think little, and lose a server."""
    raise_file_limit()
    place, state = make_place(directory, "bottleneck"), directory / "state"
    store = BearerTokenStore(state / FILE_NAME)
    tokens = directory / "tokens"
    tokens.write_text("\n".join(store.create(f"device-{n}", None) for n in range(DEVICES)))
    with ExitStack() as stack:
        ports = [free_port() for _ in range(REPLICAS)]
        options = ("--state-dir", str(state), "--trusted-proxy", "127.0.0.1", "--max-sessions", str(DEVICES * 2 // 5))
        started = [
            stack.enter_context(cloud_process(place.model, 1, *options, "--metrics", str(port))) for port in ports
        ]
        proxy = stack.enter_context(haproxy([url for url, _ in started], directory))
        metrics = [f"http://127.0.0.1:{port}/metrics" for port in ports]
        devices = (str(place.bundle), proxy.url, str(tokens))
        with _devices(devices, FEW) as fleet:
            few = _window(fleet, {"think_s": FEW_THINK_S})
            before_mb = _servers_mb(started)
        began, used = time.monotonic(), _cpu_seconds()
        with _devices(devices, DEVICES) as fleet:
            set_up = {"seconds": time.monotonic() - began, "cpu_of": _difference(_cpu_seconds(), used)}
            spread = proxy.connections()
            log(f"{DEVICES} devices are there: {set_up}, {spread}")
            idle = _window(fleet, {"think_s": NEVER_S})
            mb_each = (_servers_mb(started) - before_mb) / DEVICES  # the few's sessions are parked still, for 120 s
            found = {name: _window(fleet, {"think_s": think_s, **OUTAGES}) for name, think_s in THINK_S.items()}
            refused = _refusals(metrics[:1])
            lost = {"had": proxy.connections()[0], **_lose_server(fleet, started[0][1])}
            refused += _refusals(metrics[1:])
        unexpected = {code: n for code, n in refused.items() if not code.startswith(EXPECTED)}
    step_cpu_s, all_cores = few["cpu_s"] / few["steps"], len(os.sched_getaffinity(0))
    if few["cpu_s"] < LEAST_BUSY * all_cores * few["seconds"]:
        raise SystemExit(f"error: the few used {few['cpu_s']:.0f} s of {all_cores} cores; is there other work here?")
    cores = all_cores - idle["cpu_s"] / idle["seconds"]
    result: dict[str, Any] = {
        "devices": DEVICES, "set_up": set_up, "spread": spread, "mb_each": mb_each, "cores": cores,
        "step_cpu_ms": 1e3 * step_cpu_s, "few": few, "idle": idle, "lost": lost, "refused": dict(refused),
        "unexpected": unexpected,
    }  # fmt: skip
    for name, window in found.items():
        said = throughput(DEVICES, THINK_S[name], step_cpu_s, cores)
        result[name] = window | {
            "predicted_steps_a_s": said.steps_a_s,
            "predicted_step_s": said.step_s,
            "off_percent": 100 * abs(said.steps_a_s / window["steps_a_s"] - 1),
            "step_s": DEVICES / window["steps_a_s"] - THINK_S[name],  # Little's law
        }
    return result


def bars(found: dict[str, Any], command: str) -> dict[str, Entry]:
    """The ninth of the issue's."""
    return {
        **{
            f"devices: 1,000 that think for {think_s:.0f} s, steps a second, % off the model": at_most(
                WITHIN_PERCENT, found[name]["off_percent"], command
            )
            for name, think_s in THINK_S.items()
        },
        "devices: refusals other than quota and full": at_most(0, sum(found["unexpected"].values()), command),
        "devices: that went on when a server was killed, of 1,000": at_least(DEVICES, found["lost"]["on"], command),
    }


@contextmanager
def _devices(arguments: Sequence[str], count: int) -> Iterator[Fleet]:
    """So many devices that have begun, until the context ends."""
    share = count // PROCESSES
    with ExitStack() as stack:
        asks = [
            stack.enter_context(worker("light_devices.py", *arguments, n * share, (n + 1) * share))
            for n in range(PROCESSES)
        ]
        fleet, until = Fleet(asks), time.monotonic() + LONG_S
        while (ready := fleet.ask({"think_s": NEVER_S})["ready"]) < count:
            if time.monotonic() > until:
                raise SystemExit(f"error: only {ready} of {count} devices have begun")
            time.sleep(1)
        yield fleet


def _window(fleet: Fleet, weather: dict[str, float]) -> dict[str, Any]:
    """What is done in a while, and the processor time that it takes, by who uses it."""
    fleet.ask(weather)
    time.sleep(SETTLE_S)
    before, used, began = fleet.ask(), _cpu_seconds(), time.monotonic()
    time.sleep(WINDOW_S)
    after, used_after, seconds = fleet.ask(), _cpu_seconds(), time.monotonic() - began
    found: dict[str, Any] = {
        name: after[name] - before[name]
        for name in ("steps", "outages", "reconnects", "resumed", "bytes", "round_trips")
    }
    cpu_s = _difference(used_after, used)
    found |= {
        "think_s": weather["think_s"], "seconds": seconds, "steps_a_s": found["steps"] / seconds,
        "cpu_s": sum(cpu_s.values()), "cpu_of": cpu_s,
    }  # fmt: skip
    log(str({name: value if isinstance(value, dict) else round(value, 2) for name, value in found.items()}))
    return found


def _lose_server(fleet: Fleet, server: int) -> dict[str, Any]:
    """Kill a server's process, and wait until each device has done a step since."""
    os.kill(server, signal.SIGKILL)
    before, began = fleet.ask(), time.monotonic()
    while True:
        now = fleet.ask()
        on = sum(later > earlier for earlier, later in zip(before["each"], now["each"], strict=True))
        seconds = time.monotonic() - began
        if on == DEVICES or seconds > 8 * WINDOW_S:
            break
        time.sleep(1)
    found = {"on": on, "seconds": seconds, "reconnects": now["reconnects"] - before["reconnects"]}
    log(f"a server killed: {found}")
    return found


def _cpu_seconds() -> dict[str, float]:
    """Of all processes that this one has started, so far, by what they are."""
    found = Counter[str]()
    for process in psutil.Process().children(recursive=True):
        line = " ".join(process.cmdline())
        name = next((name for name in ("haproxy", "light_devices", "dlora.cloud") if name in line), "other")
        found[name] += cpu_seconds(process.pid)
    return dict(found)


def _difference(later: dict[str, float], earlier: dict[str, float]) -> dict[str, float]:
    return {name: later[name] - earlier.get(name, 0.0) for name in later}


def _servers_mb(started: Sequence[tuple[str, int]]) -> float:
    return sum(pss_mb(pid) for _, pid in started)


def _refusals(metrics: Sequence[str]) -> Counter[str]:
    """Of these servers, by code."""
    found = Counter[str]()
    for url in metrics:
        for metric in text_string_to_metric_families(read_page(url).decode()):
            if metric.name == "dlora_refusals":
                found.update({each.labels["code"]: round(each.value) for each in metric.samples if each.value})
    return found
