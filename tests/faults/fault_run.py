"""One run with faults: two replicas of a server, a device that trains, a proxy between them; and what came of it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from families import save_tiny
from fault_proxy import Boundary, Fault, FaultProxy, Message
from forked import END_TIMEOUT_S, Command, Start, fork_command, free_port, wait_until_it_listens
from safetensors.numpy import load_file

from dlora.edge.adapters.parts import PARTS_NAME
from dlora.edge.adapters.peft import WEIGHTS_NAME
from dlora.edge.training.checkpoint import list_checkpoints, load_latest
from dlora.export.bundle import export_bundle
from dlora.export.settings import ExportSettings

BLOCKS: Final = 4
STEPS: Final = 5
DAY_S: Final = 86400.0
LONG_S: Final = 1200.0
FULL_DISK_BYTES: Final = 4096  # a log and metrics fit, a checkpoint does not
# Kills and revivals within five steps, so that signals and tickets matter.
TRAIN: Final[tuple[object, ...]] = (
    "--batch-size", 2, "--grad-accum", 2, "--steps", STEPS, "--save-every", 1, "--threads", 1, "--lr", 0.01,
    "--seed", 0, "--kr-score", "grad",
    "--active-fraction", 0.5, "--set", "kill_revive.warmup_steps=1", "--set", "kill_revive.ramp_fraction=0",
    "--set", "kill_revive.kill_every=1",
    "--set", "kill_revive.revive_every=2", "--set", "kill_revive.probation=1",
)  # fmt: skip
_BOTTLENECK: Final = (
    "--kind", "bottleneck", "--rank", 4, "--blocks", "0-3", "--set", "adapter.basis_steps=1",
    "--active-from", "answer",
    "--wire-dtype", "int8", "--kr-on-kill", "give_to_server",
)  # fmt: skip
RUNS: Final[dict[str, tuple[object, ...]]] = {
    "lora": ("--kind", "lora"),
    "bottleneck": _BOTTLENECK,
    "ffa": ("--kind", "ffa", "--active-from", "answer", "--wire-dtype", "int8"),
    "passes": (*_BOTTLENECK, "--passes", "2,2"),
    "kept-reads": (*_BOTTLENECK, "--passes", "2,2", "--active-fraction", 1),
}
"""What is trained: the kinds, and the default one in passes; with reads that are kept, two epochs and a half."""
# What a step did. Its traffic and its times depend on what happened to it.
SAME: Final = ("step", "loss", "learning_rate", "grad_norm", "tokens", "labelled", "active_units", "units")


@dataclass(frozen=True)
class Place:
    """A model, its bundle and its data, under ``directory`` where nothing else is said; and how to start commands."""

    directory: Path
    train: tuple[object, ...] = TRAIN
    served: str = ""
    bundle_at: Path | None = None
    start: Start = fork_command

    @property
    def model(self) -> str:
        return self.served or str(self.directory / "model")

    @property
    def bundle(self) -> Path:
        return self.bundle_at or self.directory / "bundle"

    @property
    def data(self) -> Path:
        return self.directory / "data.jsonl"


def make_place(directory: Path, run: str = "lora") -> Place:
    """A tiny Llama, exported, and how its adapters are trained."""
    save_tiny(directory / "model", num_hidden_layers=BLOCKS)
    export_bundle(ExportSettings(str(directory / "model"), directory / "bundle", rank=4, alpha=8.0))
    write_data(directory / "data.jsonl", rows=8 if run == "kept-reads" else 12, answers=run != "lora")
    return Place(directory, train=(*TRAIN, *RUNS[run]))


def write_data(path: Path, seed: int = 2, rows: int = 12, *, answers: bool = False) -> None:
    """Sentences of words that the tiny tokenizer knows; with ``answers``, their first two words ask for the others."""
    rng = np.random.default_rng(seed)
    lines = [" ".join(f"w{n}" for n in rng.integers(0, 89, int(rng.integers(4, 12)))) for _ in range(rows)]
    records: list[dict[str, str]] = [{"text": line} for line in lines]
    if answers:
        halves = [line.split(" ", 2) for line in lines]
        records = [{"prompt": f"{one} {two} w89", "completion": f" {rest}"} for one, two, rest in halves]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class Replicas:
    """Servers of the same model with the same key, each on its own port, restarted there."""

    def __init__(self, place: Place, directory: Path, options: Sequence[object] = (), count: int = 2) -> None:
        self._place = place
        self._directory = directory
        self._options = options
        self._ports = [free_port() for _ in range(count)]
        self._lock = threading.RLock()
        directory.mkdir(parents=True, exist_ok=True)
        self.servers = [self._fork(index) for index in range(count)]
        for server, port in zip(self.servers, self._ports, strict=True):
            wait_until_it_listens(server, port)

    def url(self, index: int) -> str:
        return f"ws://127.0.0.1:{self._ports[index]}"

    def restart(self, index: int, number: int = signal.SIGTERM) -> None:
        """End it with a signal; then another one in its place, and return once it listens."""
        with self._lock:
            self.servers[index].signal(number)
            self.servers[index].end()
            self.servers[index] = self._fork(index)
            wait_until_it_listens(self.servers[index], self._ports[index])

    def health(self, index: int) -> dict[str, Any]:
        with urllib.request.urlopen(self.url(index).replace("ws:", "http:") + "/healthz", timeout=120) as answer:
            return dict(json.load(answer))

    def close(self) -> None:
        for server in self.servers:
            server.kill()

    def _fork(self, index: int) -> Command:
        return self._place.start(
            "cloud",
            ["serve", self._place.model, "--port", self._ports[index], "--threads", 1,
             "--state-dir", self._directory / "state", *self._options],
            self._directory / f"server-{index}.log",
        )  # fmt: skip


@contextmanager
def replicas(place: Place, directory: Path, options: Sequence[object] = (), count: int = 2) -> Iterator[Replicas]:
    running = Replicas(place, directory, options, count)
    try:
        yield running
    finally:
        running.close()


@dataclass(frozen=True)
class AtFile:
    """The device's ``nth`` operation on a file of its run, counted from 0."""

    nth: int
    name: str = ""


@dataclass
class Outcome:
    """How a run went.

    Attributes:
        wrong: what is not as it must be; nothing means that all is well.
        recovery: how it went on.
    """

    wrong: list[str] = field(default_factory=list)
    recovery: str = "went on"
    steps_lost: int = 0
    steps_doubled: int = 0
    restarts: int = 0


@dataclass
class Reference:
    """The run that nothing disturbed.

    Attributes:
        messages: what crossed, in order; files: the device's operations on files, in order.
    """

    out: Path
    messages: list[Message]
    files: list[str]

    def boundaries(self, step: int) -> list[Boundary | AtFile]:
        """Every message of a step, and every operation on a file when it is saved; and, of whichever step, what the
        server is given of killed units."""
        found: list[Boundary | AtFile] = [*_each(message for message in self.messages if message.step == step)]
        found += _each(message for message in self.messages if message.name == "group_parameters")
        saves = [nth for nth, text in enumerate(self.files) if f"checkpoint-{step + 1:06d}" in text and "open" in text]
        later = [nth for nth, text in enumerate(self.files) if f"checkpoint-{step + 2:06d}" in text]
        found += [AtFile(nth, self.files[nth]) for nth in range(saves[0], later[0])]
        return found

    def set_up_boundaries(self) -> list[Boundary]:
        """Every message before the first step's own, where the server keeps something of the adapters."""
        last = max((index for index, each in enumerate(self.messages) if each.name == "adapter_state"), default=-1)
        opening = ("hello", "welcome", "open_session", "session_opened")
        return list(_each(each for each in self.messages[: last + 1] if each.name not in opening))


def _each(messages: Iterable[Message]) -> Iterator[Boundary]:
    """A boundary at each of them, which are counted by their names."""
    counted = Counter[str]()
    for message in messages:
        yield Boundary(message.name, message.step, nth=counted[message.name])
        counted[message.name] += 1


def record(
    place: Place, running: Replicas, out: Path, options: Sequence[object] = (), *, watch: bool = True
) -> Reference:
    """Train undisturbed. Raises ``RuntimeError`` where even that fails."""
    with FaultProxy(running.url(0)) as proxy:
        device = start_device(place, out, proxy.url, options, watch=watch)
        files: list[str] = []
        watcher = answer_gate(device, files.append)
        code = device.end(LONG_S)
        watcher.join()
        if code:
            raise RuntimeError(f"the undisturbed run ended with {code}: {device.last_line()}")
        return Reference(out, proxy.messages, files)


def start_device(
    place: Place, out: Path, url: str, options: Sequence[object] = (), *, resume: bool = False, watch: bool = False
) -> Command:
    """Start a training run; its log lies beside ``out``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return place.start(
        "edge",
        ["train", "--bundle", place.bundle, "--server", url, "--data", place.data, "--out", out, *place.train,
         *options, *(["--resume"] if resume else [])],
        out.with_suffix(".log"),
        watch=out if watch else None,
        DLORA_EDGE_STATE=str(out.with_suffix(".state")),
    )  # fmt: skip


class FaultRun:
    """One disturbed run: a device at a proxy, and what each planned fault does to it."""

    def __init__(
        self, place: Place, running: Replicas, out: Path, options: Sequence[object] = (), *, most_restarts: int = 1,
        timeout_s: float = END_TIMEOUT_S,
    ) -> None:  # fmt: skip
        self._place = place
        self._running = running
        self._out = out
        self._options = options
        self._at = 0
        self._most_restarts = most_restarts
        self._timeout_s = timeout_s
        self._device: Command | None = None
        self._behind: list[threading.Thread] = []
        self.proxy = FaultProxy(running.url(0), self._strike)

    def run(self, at_file: AtFile | None = None, fault: Fault | None = None) -> Outcome:
        """Train to the end, starting the device again whenever it was killed or its disk was full."""
        outcome = Outcome()
        done = threading.Event()

        def at(text: str, counter: Iterator[int] = itertools.count()) -> None:
            if at_file is not None and fault is not None and next(counter) == at_file.nth and not done.is_set():
                done.set()
                self.proxy.do_fault(fault)

        try:
            while True:
                self._device = start_device(
                    self._place, self._out, self.proxy.url, self._options,
                    resume=outcome.restarts > 0, watch=at_file is not None and not outcome.restarts,
                )  # fmt: skip
                watcher = answer_gate(self._device, at)
                code = self._device.end(self._timeout_s)
                watcher.join()
                if code == 0:
                    break
                allowed = {-signal.SIGKILL, 9} & self._excused()
                if code not in allowed or outcome.restarts == self._most_restarts:
                    outcome.wrong.append(f"exit {code}: {self._device.last_line()}")
                    break
                outcome.restarts += 1
        except TimeoutError as error:
            outcome.wrong.append(str(error))
        finally:
            for thread in self._behind:
                thread.join()
            self.proxy.__exit__()
        outcome.recovery = self._recovery(outcome)
        return outcome

    def compare(self, outcome: Outcome, reference: Reference) -> None:
        """Add what differs from the undisturbed run, where all went well so far."""
        if not outcome.wrong:
            compare(outcome, self._out, reference.out, self.proxy.reports)

    def _excused(self) -> set[int]:
        done = set(self.proxy.done)
        return {-signal.SIGKILL for _ in done & {Fault.KILL_DEVICE}} | {9 for _ in done & {Fault.FULL_DISK}}

    def _recovery(self, outcome: Outcome) -> str:
        counts = self.proxy.counts
        if outcome.restarts:
            return "process restarted"
        if counts["session_opened"] > 1:
            return "step run again"
        return "resumed in place" if counts["session_resumed"] else "went on"

    def _strike(self, fault: Fault) -> None:
        device, index = self._device, self._at
        assert device is not None
        match fault:
            case Fault.KILL_SERVER:
                self._running.restart(index, signal.SIGKILL)
            case Fault.RESTART_SERVER:
                # Not here: while it stops, it goes on with the frames that come after this one.
                self._later(lambda: self._running.restart(index))
            case Fault.SWAP_REPLICA:
                self._at = 1 - index
                self.proxy.point_at(self._running.url(self._at))
            case Fault.KILL_DEVICE:
                device.signal(signal.SIGKILL)
            case Fault.FREEZE_SERVER:
                server, connections = self._running.servers[index], self.proxy.connections
                server.signal(signal.SIGSTOP)
                self._later(lambda: _poll(lambda: self.proxy.connections > connections, server))
            case Fault.FREEZE_DEVICE:
                device.signal(signal.SIGSTOP)
                self._later(lambda: _poll(lambda: self._running.health(index)["parked_sessions"], device))
            case Fault.FULL_DISK:
                device.fill_disk(FULL_DISK_BYTES)
            case Fault.CLOCK_JUMP:
                # Wall clocks go both ways; a monotonic one only ahead, as after a sleep.
                device.clocks.jump(wall=-DAY_S, monotonic=DAY_S)
                self._running.servers[index].clocks.jump(wall=DAY_S, monotonic=DAY_S)
            case _:
                raise AssertionError(fault)

    def _later(self, action: Callable[[], None]) -> None:
        self._behind.append(threading.Thread(target=action, daemon=True))
        self._behind[-1].start()


def compare(outcome: Outcome, out: Path, wanted: Path, reports: dict[int, set[bytes]]) -> None:
    """Add to ``outcome`` what differs from the undisturbed run: bits, steps lost, steps done twice."""
    rows, wanted_rows = _rows(out), _rows(wanted)
    steps, wanted_steps = [row["step"] for row in rows], [row["step"] for row in wanted_rows]
    checkpoint, wanted_checkpoint = load_latest(out / "checkpoints"), load_latest(wanted / "checkpoints")
    assert checkpoint is not None
    assert wanted_checkpoint is not None
    # AdamW counts its steps itself: one that was committed twice shows here.
    extra = sum(checkpoint.state["adam_steps"]) - sum(wanted_checkpoint.state["adam_steps"])
    outcome.steps_lost += len(set(wanted_steps) - set(steps)) + max(0, -extra)
    outcome.steps_doubled += len(steps) - len(set(steps)) + max(0, extra)
    if steps != wanted_steps or extra:
        outcome.wrong.append(f"steps {steps}, AdamW's steps differ by {extra}")
    if rows != wanted_rows:
        outcome.wrong.append("metrics differ")
    for name in (WEIGHTS_NAME, PARTS_NAME):
        found, undisturbed = (each / name for each in (out, wanted))
        if undisturbed.exists() and found.read_bytes() != undisturbed.read_bytes():
            outcome.wrong.append(f"{name} differs")
    tensors, wanted_tensors = (load_file(list_checkpoints(each / "checkpoints")[0][1]) for each in (out, wanted))
    if any(tensors[name].tobytes() != wanted_tensors[name].tobytes() for name in wanted_tensors):
        outcome.wrong.append("AdamW's state differs")
    if any(len(scores) > 1 for scores in reports.values()):
        outcome.wrong.append("a step that was run again gave other scores")


def _poll(noticed: Callable[[], Any], frozen: Command) -> None:
    """Let a frozen process go on once the other side has noticed that it says nothing."""
    try:
        while not noticed() and frozen.exists():
            time.sleep(0.02)
    finally:
        frozen.signal(signal.SIGCONT)


def _rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{key: row[key] for key in SAME} for row in map(json.loads, lines)]


def answer_gate(device: Command, is_full: Callable[[str], object]) -> threading.Thread:
    """Ask ``is_full`` before each of the device's file operations, which waits for it and fails where it is true."""

    def answer() -> None:
        if device.gate is None:
            return
        with suppress(EOFError, OSError):
            while True:
                device.gate.send_bytes(b"full" if is_full(os.fsdecode(device.gate.recv_bytes())) else b"go")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    return thread
