"""A TCP proxy between a device and a server that reads along, and does one planned fault at one planned message.

It is the real thing in the middle: real sockets, whole websocket frames. What happens is decided by counting messages,
never by a clock, so that a plan hits the same message in every run.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from io import BufferedReader
from typing import Final, Literal
from urllib.parse import urlsplit

import numpy as np

from dlora.protocol import messages as m
from dlora.protocol.errors import ProtocolError
from dlora.protocol.frames import Decoder

BINARY: Final = 2
DELAY_S: Final = 0.05
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)

Direction = Literal["up", "down"]


class Fault(Enum):
    """What can go wrong between, or on, the two machines."""

    KILL_SERVER = "kill server"
    KILL_DEVICE = "kill device"
    CUT_LINK = "cut link"
    HALF_OPEN = "half-open link"
    DUPLICATE = "duplicate"
    DELAY = "delay"
    TRUNCATE = "truncate"
    CORRUPT = "corrupt a byte"
    RESTART_SERVER = "restart server"
    SWAP_REPLICA = "swap replica"
    FULL_DISK = "full disk"
    CLOCK_JUMP = "clock jump"
    FREEZE_SERVER = "freeze server"
    FREEZE_DEVICE = "freeze device"


ON_A_FRAME: Final = frozenset({Fault.DUPLICATE, Fault.DELAY, Fault.TRUNCATE, Fault.CORRUPT})
"""Faults that happen to one frame; the others happen before or after one."""
CUTS: Final = frozenset({Fault.KILL_SERVER, Fault.KILL_DEVICE, Fault.CUT_LINK, Fault.SWAP_REPLICA})
"""Faults after which the connection is no more."""


@dataclass(frozen=True)
class Message:
    """What a frame says, as far as plans care; ``step`` is None where the message has none."""

    name: str
    direction: Direction
    step: int | None = None


@dataclass(frozen=True)
class Boundary:
    """The ``nth`` message (from 0) that is like this; what is None may be anything."""

    name: str | None = None
    step: int | None = None
    direction: Direction | None = None
    nth: int = 0

    def is_like(self, message: Message) -> bool:
        return (
            self.name in (None, message.name)
            and self.step in (None, message.step)
            and self.direction in (None, message.direction)
        )


@dataclass
class Plan:
    """One fault at one boundary, once."""

    fault: Fault
    boundary: Boundary = Boundary()
    when: Literal["before", "after"] = "before"
    done: bool = False
    seen: int = 0

    def matches(self, message: Message) -> bool:
        if self.done or not self.boundary.is_like(message):
            return False
        self.seen += 1
        self.done = self.seen > self.boundary.nth
        return self.done


class FaultProxy:
    """Listens at ``url`` and passes on to a server, whose address may change, until its context ends.

    Args:
        strike: does what a proxy cannot do itself: kills, restarts, full disks, clocks. Called in the thread that
            holds the frame, so that the frame waits for it.

    Attributes:
        messages: all that went through, in order; counts: how many of each name.
        reports: by step, the scores of every report of it. More than one means that a step was run twice and
            was not the same.
        done: the faults so far, in order; connections: of devices so far.
    """

    def __init__(self, server_url: str, strike: Callable[[Fault], None] = lambda _: None) -> None:
        self.counts: Counter[str] = Counter()
        self.messages: list[Message] = []
        self.reports: dict[int, set[bytes]] = {}
        self.done: list[Fault] = []
        self.connections = 0
        self._strike = strike
        self._random = random.Random(0)
        self._plans: list[Plan] = []
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self.point_at(server_url)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def plan(self, *plans: Plan) -> None:
        """Add plans; each is done once."""
        with self._lock:
            self._plans += plans

    def point_at(self, server_url: str) -> None:
        """Where connections go from now on."""
        self._server = (urlsplit(server_url).hostname, urlsplit(server_url).port)

    def do_fault(self, fault: Fault) -> None:
        """Do it now, or to the next frame."""
        if fault in ON_A_FRAME:
            self.plan(Plan(fault))
            return
        links = self._snapshot()
        if links or fault not in (Fault.CUT_LINK, Fault.HALF_OPEN):  # else there is nothing that it could happen to
            self.done.append(fault)
            self._happen(fault, links)

    def _happen(self, fault: Fault, links: Iterable[_Link]) -> None:
        if fault not in (Fault.CUT_LINK, Fault.HALF_OPEN):
            self._strike(fault)
        for link in links:
            link.silent |= fault is Fault.HALF_OPEN
            if fault in CUTS:
                link.reset()

    @property
    def pending(self) -> list[Plan]:
        """The plans that are not done."""
        with self._lock:
            return [plan for plan in self._plans if not plan.done]

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # a blocked accept() does not notice close()
        self._listener.close()
        for link in self._snapshot():
            link.reset()
        self._accepting.join(5)

    # -- one frame -------------------------------------------------------------------------------------------

    def pass_on(self, link: _Link, direction: Direction, frame: bytearray, message: Message | None) -> None:
        """Send a frame, and damage it or its connection where that is planned."""
        fault, when = self._planned(message)
        if fault is None:
            link.send(direction, frame)
            return
        self.done.append(fault)
        match fault:
            case Fault.DUPLICATE:
                link.send(direction, frame + frame)
            case Fault.DELAY:
                time.sleep(DELAY_S)
                link.send(direction, frame)
            case Fault.CORRUPT:
                head = _head_bytes(frame)
                frame[self._random.randrange(head, len(frame))] ^= 1 << self._random.randrange(8)
                link.send(direction, frame)
            case Fault.TRUNCATE:
                link.send(direction, frame[: len(frame) // 2])
                link.close()
            case _:
                if when == "after":
                    link.send(direction, frame)
                self._happen(fault, [link])
                if when == "before" and fault not in CUTS:
                    link.send(direction, frame)

    def saw(self, direction: Direction, decoded: m.AnyMessage) -> Message:
        name = str(decoded.__struct_config__.tag)
        message = Message(name, direction, getattr(decoded, "step", None))
        with self._lock:
            self.counts[name] += 1
            self.messages.append(message)
            if isinstance(decoded, m.StepReport):
                self.reports.setdefault(decoded.step, set()).add(decoded.scores.data.tobytes())
        return message

    def _planned(self, message: Message | None) -> tuple[Fault | None, str]:
        if message is None:
            return None, ""
        with self._lock:
            # All of them count, and at most one is done: two faults at one message are one after the other.
            matching = [plan for plan in self._plans if plan.matches(message)]
        return (matching[0].fault, matching[0].when) if matching else (None, "")

    # -- connections -----------------------------------------------------------------------------------------

    def _snapshot(self) -> list[_Link]:
        with self._lock:
            return list(self._links)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                device, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._connect, args=(device,), daemon=True).start()

    def _connect(self, device: socket.socket) -> None:
        try:
            server = socket.create_connection(self._server, timeout=10)
        except OSError:
            device.close()
            return
        server.settimeout(None)
        for end in (device, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _Link(device, server)
        with self._lock:
            self._links.add(link)
        down = threading.Thread(target=self._pump, args=(link, "down"), daemon=True)
        down.start()
        self._pump(link, "up")
        down.join()
        with self._lock:
            self._links.discard(link)
        link.close()

    def _pump(self, link: _Link, direction: Direction) -> None:
        decoder = Decoder()
        source = link.to["down" if direction == "up" else "up"]
        with suppress(OSError, ValueError), source.makefile("rb", 1 << 16) as stream:
            _pass_http(link, direction, stream)
            while frame := _read_frame(stream):
                message = None
                if frame[0] & 15 == BINARY:
                    with suppress(ProtocolError):
                        message = self.saw(direction, decoder.decode(_payload(frame)))
                self.pass_on(link, direction, frame, message)
        link.end(direction)


class _Link:
    """The two sockets of one connection.

    Attributes:
        silent: whether everything is swallowed from now on, both ways, and nobody told.
        to: where what goes in a direction is sent.
    """

    def __init__(self, device: socket.socket, server: socket.socket) -> None:
        self.silent = False
        self.to: dict[Direction, socket.socket] = {"up": server, "down": device}

    def send(self, direction: Direction, data: bytes | bytearray) -> None:
        if not self.silent:
            self.to[direction].sendall(data)

    def end(self, direction: Direction) -> None:
        """One side has hung up: pass that on, unless the line is dead."""
        if not self.silent:
            with suppress(OSError):
                self.to[direction].shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """RST both ways: what is under way is lost."""
        for end in self.to.values():
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.close()

    def close(self) -> None:
        for end in self.to.values():
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it
            end.close()


def _pass_http(link: _Link, direction: Direction, stream: BufferedReader) -> None:
    """The websocket's opening, or all of an answer that refuses it."""
    head = bytearray()
    while line := stream.readline():
        head += line
        if line == b"\r\n":
            break
    link.send(direction, head)
    if direction == "down" and not head.startswith(b"HTTP/1.1 101"):
        while data := stream.read1():
            link.send(direction, data)


def _read_frame(stream: BufferedReader) -> bytearray:
    """One websocket frame as it came; empty at the end."""
    head = stream.read(2)
    if len(head) < 2:
        return bytearray()
    head += stream.read(_head_bytes(head) - 2)
    length = head[1] & 127
    if length > 125:
        length = int.from_bytes(head[2 : 4 if length == 126 else 10], "big")
    payload = stream.read(length)
    return bytearray(head + payload) if len(payload) == length else bytearray()


def _head_bytes(frame: bytes | bytearray) -> int:
    length, masked = frame[1] & 127, frame[1] >> 7
    return 2 + {126: 2, 127: 8}.get(length, 0) + 4 * masked


def _payload(frame: bytearray) -> bytes:
    head = _head_bytes(frame)
    body = np.frombuffer(frame, np.uint8)[head:]
    if not frame[1] >> 7:
        return body.tobytes()
    mask = np.resize(np.frombuffer(frame, np.uint8)[head - 4 : head], len(body))
    return (body ^ mask).tobytes()
