"""Every abuse of the server that we know, and what must stop it.

``ABUSES`` are over at once: each gives an ``Outcome``, such as ``close 1009`` or ``error non_finite``. ``IDLE_ATTACKS``
hold on: each is a context in which connections sit on the server. README.md has them as tables.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import conversations
import msgspec
import numpy as np
from hostile import BINARY, CLOSE, CONT, PING, PONG, TEXT, HostileClient, frame, hostile, hostile_websocket, request

from dlora.protocol import messages as m
from dlora.protocol.frames import HEADER_BLOCK, PREFIX_BYTES, Decoder, encode, write_checksum
from dlora.protocol.groups import GroupSpec, TargetSpec
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.link import MAX_UNACKNOWLEDGED
from dlora.protocol.session import Session
from dlora.protocol.states import Side
from dlora.protocol.tensors import WireTensor
from dlora.protocol.version import PROTOCOL_VERSIONS
from dlora.protocol.wire_codecs import encode_floats

Outcome = str
DROPPED, GONE, PASSED_OVER = "dropped", "session_gone", "passed over"
HALF_A_TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
TOKENS = 3
GIB = 1 << 30


@dataclass(frozen=True)
class Target:
    """A server, and exchange groups that it has traced: without those there is no session."""

    url: str
    groups: tuple[GroupSpec, ...]
    source: str | None = None

    def socket(self, **how: Any) -> AbstractContextManager[HostileClient]:
        return hostile(self.url, source=self.source, **how)

    def websocket(self, **how: Any) -> AbstractContextManager[HostileClient]:
        return hostile_websocket(self.url, source=self.source, **how)

    @contextmanager
    def greeted(self, **how: Any) -> Iterator[HostileDevice]:
        """A device that has kept the rules up to ``welcome``."""
        with self.websocket(**how) as client:
            device = HostileDevice(client, self)
            device.greet()
            yield device

    @contextmanager
    def opened(self, **how: Any) -> Iterator[HostileDevice]:
        """One that has a session, too."""
        with self.greeted(**how) as device:
            device.say(device.opening())
            opened = device.hear()
            assert isinstance(opened, m.SessionOpened)
            device.name = opened.session
            yield device


class HostileDevice:
    """A device that knows the rules (``session``), so that it breaks just the one that it wants to."""

    def __init__(self, client: HostileClient, target: Target) -> None:
        self.client = client
        self.session = Session(Side.EDGE)
        self.name = ""
        self.target = target

    def greet(self) -> None:
        self.say(m.Hello(protocol_versions=list(PROTOCOL_VERSIONS), software="hostile"))
        assert isinstance(self.hear(), m.Welcome)

    @property
    def welcome(self) -> m.Welcome:
        assert self.session.welcome is not None
        return self.session.welcome

    def opening(self, **changes: Any) -> m.OpenSession:
        settings: dict[str, Any] = {
            "base_fingerprint": self.welcome.base_fingerprint,
            "groups": self.target.groups,
            "kill_revive": KillReviveConfig(active_fraction=1.0),
            "seed": 0,
        }
        return conversations.open_session(**{**settings, **changes})

    def embeddings(self, tokens: int = TOKENS, value: float = 1.0, **changes: Any) -> m.Embeddings:
        return conversations.embeddings_of([tokens], self.welcome.embedding_size, value, **changes)

    def say(self, message: m.AnyMessage) -> None:
        """By the rules. Raises ``LocalProtocolError``, so that no abuse is a mistake."""
        self.client.frame(BINARY, self.session.send(message))

    def say_anyway(self, message: m.AnyMessage, *, seq: int = 0, ack: int = 0) -> Outcome:
        """Against the rules, in a frame that is in order; gives what comes of it."""
        self.client.frame(BINARY, encode(message, seq=seq, ack=ack))
        return self.outcome()

    def hear(self) -> m.AnyMessage | None:
        heard = self.client.hear()
        assert heard is not None
        assert heard[0] == BINARY, f"hung up: {heard[1]!r}"
        return self.session.receive(heard[1])

    def outcome(self) -> Outcome:
        return outcome(self.client)


def outcome(client: HostileClient) -> Outcome:
    """Read until the server gets rid of us: the last thing that it said."""
    decoder = Decoder()
    with suppress(ConnectionError):
        while (heard := client.hear()) is not None:
            opcode, payload = heard
            if opcode == BINARY and isinstance(message := decoder.decode(payload), m.Error):
                return f"error {message.code}"
            if opcode == CLOSE:
                code = struct.unpack("!H", payload[:2])[0]
                return f"close {code} {payload[2:].decode()}" if code == 1008 else f"close {code}"
    return DROPPED


def raw_frame(header: bytes, tensors: bytes = b"", *, seq: int = 0, header_length: int | None = None) -> bytearray:
    """A frame with any header and a checksum that is right."""
    prefix = struct.pack("<IIII", len(header) if header_length is None else header_length, seq, 0, 0)
    padding = -(PREFIX_BYTES + len(header)) % HEADER_BLOCK
    return write_checksum(bytearray(prefix + header + bytes(padding) + tensors))


def packed_frame(header: object, tensors: bytes = b"", *, seq: int = 0) -> bytes:
    return frame(BINARY, raw_frame(msgspec.msgpack.encode(header), tensors, seq=seq))


# -- over at once ----------------------------------------------------------------------------------------

HELLO = encode(m.Hello(protocol_versions=list(PROTOCOL_VERSIONS), software="x"))

INSTEAD_OF_HTTP: dict[str, tuple[bytes, tuple[Outcome, ...]]] = {
    "browser_origin": (request(Origin="https://evil.example"), ("http 403",)),
    "huge_headers": (request(X=1_000_000 * "x"), ("http 400", "http 431", DROPPED)),
    "no_http": (b"\x00\x01\x02 this is no HTTP\r\n\r\n" * 9, ("http 400", DROPPED)),
    "tls_hello_to_a_plain_port": (HALF_A_TLS_HELLO + b"\n", ("http 400", DROPPED)),
}

BEFORE_HELLO: dict[str, tuple[bytes, tuple[Outcome, ...]]] = {
    "text_frame": (frame(TEXT, b"hello"), ("close 1008 protocol",)),
    "empty_fragments": (frame(BINARY, fin=0) + frame(CONT, fin=0) * 10_000, ("close 1008 protocol",)),
    "unmasked_frame": (frame(BINARY, b"x", masked=0), ("close 1002",)),
    "ping_flood": (frame(PING, bytes(125)) * 1000, ("close 1008 flood",)),
    "pong_flood": (frame(PONG) * 1000, ("close 1008 flood",)),
    "message_flood": (frame(BINARY) * 10_000, ("close 1008 flood", "error damaged", "error protocol", DROPPED)),
    "oversized_frame": (frame(BINARY, length=(64 << 10) + 1), ("close 1009",)),
    "garbage": (frame(BINARY, b"garbage" * 99), ("error damaged",)),
    "deep_nesting": (frame(BINARY, raw_frame(b"\x91" * 60_000 + b"\xc0")), ("error protocol",)),
    "deep_nesting_in_a_field": (
        frame(BINARY, raw_frame(b"\x82\xa4type\xa5hello\xa8software" + b"\x91" * 60_000 + b"\xc0")),
        ("error protocol",),
    ),
    "header_that_claims_too_much": (frame(BINARY, raw_frame(b"", header_length=(1 << 32) - 1)), ("error limit",)),
    "unknown_field": (
        packed_frame({"type": "hello", "protocol_versions": [1], "software": "x", "admin": True}),
        ("error protocol",),
    ),
    "hundred_hellos": (frame(BINARY, HELLO) * 100, ("error protocol", "close 1008 flood")),
    "no_version_of_ours": (frame(BINARY, encode(m.Hello(protocol_versions=[999], software="x"))), ("error version",)),
    "version_that_was_never_released": (
        frame(BINARY, encode(m.Hello(protocol_versions=[1], software="x"))),
        ("error version",),
    ),
    "session_before_hello": (frame(BINARY, encode(m.CloseSession())), ("error protocol",)),
}

AFTER_HELLO: dict[str, tuple[Callable[[HostileDevice], bytes], Outcome]] = {
    "oversized_frame_after_hello": (lambda _: frame(BINARY, length=1 << 20), "close 1009"),
    # 3.6 MB of target modules, each of them in order by itself.
    "huge_open_session": (lambda device: opening(device, groups=(GroupSpec(0, 1, MANY_TARGETS),)), "close 1009"),
    "other_base_model": (lambda device: opening(device, base_fingerprint="0" * 64), "error base_model_mismatch"),
    "groups_twice": (lambda device: opening(device, groups=device.target.groups * 2), "error unknown_target"),
    "run_without_groups": (lambda device: opening(device, groups=()), "error limit"),
    "forged_line_in_the_log": (
        lambda device: opening(device, groups=(GroupSpec(0, 1, (TargetSpec(FORGED_LINE, 1),)),)),
        "error unknown_target",
    ),
    "forged_ticket": (lambda device: opening(device, next_step=3, ticket=bytes(300)), "error ticket"),
}
MANY_TARGETS = tuple(TargetSpec(f"model.layers.{number}.self_attn.q_proj", 1) for number in range(64_000))
FORGED_LINE = "x\n12:00:00 session 00000000: closed\x1b[2J"

IN_A_SESSION: dict[str, tuple[Callable[[HostileDevice], bytes], Outcome]] = {
    "ping_flood_in_a_session": (lambda _: frame(PING) * 1000, "close 1008 flood"),
    "oversized_frame_in_a_session": (lambda _: frame(BINARY, length=GIB), "close 1009"),
    "claimed_shape_too_large": (lambda _: packed_frame(CLAIMED_SHAPE, bytes(64), seq=1), "error protocol"),
    "too_many_tokens": (lambda device: beginning(device, device.welcome.max_tokens + 1), "error limit"),
    "wrong_width": (lambda device: beginning(device, hidden_states=ONE_WIDE), "error protocol"),
    "nan": (lambda device: beginning(device, value=np.nan), "error non_finite"),
    "wrong_step": (lambda device: beginning(device, step=7), "error protocol"),
    "gap_in_the_numbers": (lambda device: beginning(device, seq=2), "error protocol"),
    "acknowledgement_of_the_future": (lambda device: beginning(device, ack=9), "error protocol"),
}
ONE_WIDE = encode_floats(np.ones((TOKENS, 1), np.float32), "fp32")
CLAIMED_SHAPE = {
    "type": "embeddings", "step": 0, "micro_batch": 0, "mode": "train",
    "hidden_states": ["fp32", [2**31 - 1, 2**31 - 1], 0],
    "sequence_lengths": ["int32", [1], 0], "label_positions": ["int32", [1], 0],
}  # fmt: skip


def opening(device: HostileDevice, **changes: Any) -> bytes:
    return frame(BINARY, encode(device.opening(**changes)))


def beginning(device: HostileDevice, tokens: int = TOKENS, *, seq: int = 1, ack: int = 0, **changes: Any) -> bytes:
    return frame(BINARY, encode(device.embeddings(tokens, **changes), seq=seq, ack=ack))


def instead_of_http(data: bytes, target: Target) -> Outcome:
    with target.socket() as client, suppress(ConnectionError):
        with suppress(ConnectionError):
            client.send(data)
        status = client.status()
        return f"http {status}" if status else DROPPED
    return DROPPED


def before_hello(data: bytes, target: Target) -> Outcome:
    with target.websocket() as client:
        with suppress(ConnectionError):
            client.send(data)
        return outcome(client)


def after_hello(data: Callable[[HostileDevice], bytes], target: Target) -> Outcome:
    with target.greeted() as device:
        with suppress(ConnectionError):
            device.client.send(data(device))
        return device.outcome()


def in_a_session(data: Callable[[HostileDevice], bytes], target: Target) -> Outcome:
    with target.opened() as device:
        device.client.send(data(device))
        return device.outcome()


ABUSES: dict[str, tuple[Callable[[Target], Outcome], tuple[Outcome, ...]]] = {
    **{name: (partial(instead_of_http, data), expected) for name, (data, expected) in INSTEAD_OF_HTTP.items()},
    **{name: (partial(before_hello, data), expected) for name, (data, expected) in BEFORE_HELLO.items()},
    **{name: (partial(after_hello, data), (expected,)) for name, (data, expected) in AFTER_HELLO.items()},
    **{name: (partial(in_a_session, data), (expected,)) for name, (data, expected) in IN_A_SESSION.items()},
}
"""With more than one outcome, which one it is depends on what the server has read by then."""


def stopped_by(expected: Outcome) -> Callable[[Callable[[Target], Outcome]], Callable[[Target], Outcome]]:
    """Register an abuse that is more than one thing sent."""

    def register(run: Callable[[Target], Outcome]) -> Callable[[Target], Outcome]:
        ABUSES[run.__name__] = (run, (expected,))
        return run

    return register


@stopped_by(GONE)
def session_of_another(target: Target) -> Outcome:
    with target.opened() as victim, target.greeted() as device:
        device.say(m.ResumeSession(session=victim.name, token=bytes(m.RESUME_TOKEN_BYTES), received=0))
        return GONE if isinstance(device.hear(), m.SessionGone) else "resumed"


@stopped_by("error protocol")
def wrong_group(target: Target) -> Outcome:
    with target.opened() as device:
        device.say(device.embeddings())
        asked = device.hear()
        assert isinstance(asked, m.GroupInput)
        deltas = tuple(
            encode_floats(np.ones((TOKENS, out.out_features), np.float32), "fp32")
            for out in target.groups[asked.groups[0]].targets
        )
        answer = m.GroupDelta(step=0, micro_batch=0, groups=(len(target.groups),), deltas=deltas)
        return device.say_anyway(answer, seq=2, ack=1)


@stopped_by("error protocol")
def replay_with_other_content(target: Target) -> Outcome:
    with target.opened() as device:
        device.say(device.embeddings())
        return device.say_anyway(device.embeddings(value=2.0), seq=1)


@stopped_by(PASSED_OVER)
def replay(target: Target) -> Outcome:
    with target.opened() as device:
        begun = device.session.send(device.embeddings())
        device.client.frame(BINARY, begun)
        device.client.frame(BINARY, begun)
        asked = device.hear()
        assert isinstance(asked, m.GroupInput)
        device.say(m.Error(code="internal", message="enough"))
        return PASSED_OVER if device.outcome() in (DROPPED, "close 1000") else "refused"


@stopped_by("error protocol")
def never_acknowledges(target: Target) -> Outcome:
    with target.greeted() as device:
        device.say(device.opening(total_steps=99))
        device.hear()
        scores = WireTensor("fp32", np.ones(len(device.session.units.states), np.float32))
        for step in range(MAX_UNACKNOWLEDGED):
            report = m.StepReport(step=step, scores=scores)
            device.session.send(report)
            device.client.frame(BINARY, encode(report, seq=step + 1))
            assert isinstance(device.hear(), m.Signal)
        return device.say_anyway(m.StepReport(step=MAX_UNACKNOWLEDGED, scores=scores), seq=MAX_UNACKNOWLEDGED + 1)


# -- holding on ------------------------------------------------------------------------------------------

IdleAttack = Callable[[Target, ExitStack], tuple[HostileClient, bytes]]
"""Makes one connection that stays, and says what it goes on sending, a byte now and then."""


def half_a_tls_hello(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    client = held.enter_context(target.socket())
    client.send(HALF_A_TLS_HELLO)
    return client, b""


def most_of_a_frame(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    """As much of the server's memory as a stranger gets: 64 KiB are allowed, and never end."""
    client = held.enter_context(target.greeted()).client
    client.send(frame(BINARY, bytes(60 << 10), length=64 << 10))
    return client, b""


IDLE_ATTACKS: dict[str, IdleAttack] = {
    "idle_socket": lambda target, held: (held.enter_context(target.socket()), b""),
    "idle_websocket": lambda target, held: (held.enter_context(target.websocket()), b""),
    "idle_after_hello": lambda target, held: (held.enter_context(target.greeted()).client, b""),
    "half_a_tls_hello": half_a_tls_hello,
    "slow_http": lambda target, held: (held.enter_context(target.socket()), request(X="x" * 4000)),
    "slow_frame": lambda target, held: (held.enter_context(target.websocket()), frame(BINARY, bytes(60_000))),
    "most_of_a_frame": most_of_a_frame,
}


def silent_in_a_step(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    device = held.enter_context(target.opened())
    device.say(device.embeddings())
    device.hear()
    return device.client, b""


def slow_in_a_step(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    device = held.enter_context(target.opened())
    return device.client, frame(BINARY, device.session.send(device.embeddings(30)))


def repeats_itself_in_a_session(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    device = held.enter_context(target.opened())
    scores = WireTensor("fp32", np.ones(len(target.groups), np.float32))
    report = device.session.send(m.StepReport(step=0, scores=scores))
    device.client.frame(BINARY, report)
    assert isinstance(device.hear(), m.Signal)
    return device.client, frame(BINARY, report)


def repeats_itself_in_a_step(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    device = held.enter_context(target.opened())
    begun = device.session.send(device.embeddings())
    device.client.frame(BINARY, begun)
    assert isinstance(device.hear(), m.GroupInput)
    return device.client, frame(BINARY, begun)


def reads_nothing(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    device = held.enter_context(target.opened(receive_buffer=4096))
    device.say(device.embeddings(min(1000, device.welcome.max_sequence_length)))
    return device.client, b""


IDLE_ATTACKS_IN_A_SESSION: dict[str, IdleAttack] = {
    "silent_in_a_session": lambda target, held: (held.enter_context(target.opened()).client, b""),
    **{
        attack.__name__: attack
        for attack in (
            silent_in_a_step,
            slow_in_a_step,
            repeats_itself_in_a_session,
            repeats_itself_in_a_step,
            reads_nothing,
        )
    },
}
"""The same with a session each, of which a server has only so many."""


@contextmanager
def idle_connections(
    target: Target, make: IdleAttack, count: int, every_s: float = 0.01
) -> Iterator[list[HostileClient]]:
    """``count`` connections that sit on the server, whether or not it has dropped some of them by now."""
    stop = threading.Event()
    with ExitStack() as held:
        sitting: list[tuple[HostileClient, bytes]] = []

        def trickle() -> None:
            position = 0
            while not stop.wait(every_s):
                for client, data in sitting:
                    if data:
                        with suppress(OSError):
                            client.send(data[position % len(data) :][:1])
                position += 1

        for _ in range(count):
            with suppress(OSError, AssertionError):  # a server that is full refuses some
                sitting.append(make(target, held))
        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        try:
            yield [client for client, _ in sitting]
        finally:
            stop.set()
            thread.join()
