"""Every abuse of the server that we know, one function each, and what must stop it.

``ABUSES`` are over at once: each gives an ``Outcome``, such as ``close 1009`` or ``error non_finite``. ``IDLE_ATTACKS``
hold on: each is a context in which connections sit on the server. README.md has them as tables.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
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
        self._target = target

    def greet(self) -> None:
        self.say(m.Hello(protocol_versions=list(PROTOCOL_VERSIONS), software="hostile"))
        assert isinstance(self.hear(), m.Welcome)

    def opening(self, **changes: Any) -> m.OpenSession:
        assert self.session.welcome is not None
        settings: dict[str, Any] = {
            "base_fingerprint": self.session.welcome.base_fingerprint,
            "groups": self._target.groups,
            "kill_revive": KillReviveConfig(active_fraction=1.0),
            "seed": 0,
        }
        return conversations.open_session(**{**settings, **changes})

    def embeddings(self, tokens: int = TOKENS, value: float = 1.0, **changes: Any) -> m.Embeddings:
        assert self.session.welcome is not None
        width = self.session.welcome.embedding_size
        return conversations.embeddings_of([tokens], width, value, **changes)

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


# -- over at once ----------------------------------------------------------------------------------------

ABUSES: dict[str, tuple[Callable[[Target], Outcome], tuple[Outcome, ...]]] = {}


def stopped_by(*expected: Outcome) -> Callable[[Callable[[Target], Outcome]], Callable[[Target], Outcome]]:
    """Register an abuse. With more than one outcome, which one it is depends on what the server has read by then."""

    def register(run: Callable[[Target], Outcome]) -> Callable[[Target], Outcome]:
        ABUSES[run.__name__] = (run, expected)
        return run

    return register


def http(client: HostileClient) -> Outcome:
    with suppress(ConnectionError):
        status = client.status()
        return f"http {status}" if status else DROPPED
    return DROPPED


@stopped_by("http 403")
def browser_origin(target: Target) -> Outcome:
    with target.socket() as client:
        return f"http {client.upgrade(Origin='https://evil.example')}"


@stopped_by("http 400", "http 431", DROPPED)
def huge_headers(target: Target) -> Outcome:
    with target.socket() as client:
        with suppress(ConnectionError):
            client.send(request(X=1_000_000 * "x"))
        return http(client)


@stopped_by("http 400", DROPPED)
def no_http(target: Target) -> Outcome:
    with target.socket() as client:
        client.send(b"\x00\x01\x02 this is no HTTP\r\n\r\n" * 9)
        return http(client)


@stopped_by("http 400", DROPPED)
def tls_hello_to_a_plain_port(target: Target) -> Outcome:
    with target.socket() as client:
        client.send(HALF_A_TLS_HELLO + b"\n")
        return http(client)


@stopped_by("close 1008 protocol")
def text_frame(target: Target) -> Outcome:
    with target.websocket() as client:
        client.frame(TEXT, b"hello")
        return outcome(client)


@stopped_by("close 1008 protocol")
def empty_fragments(target: Target) -> Outcome:
    with target.websocket() as client:
        client.send(frame(BINARY, fin=0) + frame(CONT, fin=0) * 10_000)
        return outcome(client)


@stopped_by("close 1002")
def unmasked_frame(target: Target) -> Outcome:
    with target.websocket() as client:
        client.frame(BINARY, b"x", masked=0)
        return outcome(client)


@stopped_by("close 1008 flood")
def ping_flood(target: Target) -> Outcome:
    with target.websocket() as client:
        client.send(frame(PING, bytes(125)) * 1000)
        return outcome(client)


@stopped_by("close 1008 flood")
def pong_flood(target: Target) -> Outcome:
    with target.websocket() as client:
        client.send(frame(PONG) * 1000)
        return outcome(client)


@stopped_by("close 1008 flood")
def ping_flood_in_a_session(target: Target) -> Outcome:
    with target.opened() as device:
        device.client.send(frame(PING) * 1000)
        return device.outcome()


@stopped_by("close 1008 flood", "error damaged", "error protocol", DROPPED)
def message_flood(target: Target) -> Outcome:
    with target.websocket() as client:
        client.send(frame(BINARY) * 10_000)
        return outcome(client)


@stopped_by("close 1009")
def oversized_frame(target: Target) -> Outcome:
    with target.websocket() as client:
        client.send(frame(BINARY, length=(64 << 10) + 1))
        return outcome(client)


@stopped_by("close 1009")
def oversized_frame_after_hello(target: Target) -> Outcome:
    with target.greeted() as device:
        device.client.send(frame(BINARY, length=1 << 20))
        return device.outcome()


@stopped_by("close 1009")
def huge_open_session(target: Target) -> Outcome:
    """3.6 MB of target modules, each of them in order by itself."""
    many = tuple(TargetSpec(f"model.layers.{number}.self_attn.q_proj", 1) for number in range(64_000))
    with target.greeted() as device:
        with suppress(ConnectionError):
            device.client.frame(BINARY, encode(device.opening(groups=(GroupSpec(0, 1, many),))))
        return device.outcome()


@stopped_by("close 1009")
def oversized_frame_in_a_session(target: Target) -> Outcome:
    with target.opened() as device:
        device.client.send(frame(BINARY, length=GIB))
        return device.outcome()


@stopped_by("error damaged")
def garbage(target: Target) -> Outcome:
    with target.websocket() as client:
        client.frame(BINARY, b"garbage" * 99)
        return outcome(client)


@stopped_by("error protocol")
def deep_nesting(target: Target) -> Outcome:
    with target.websocket() as client:
        client.frame(BINARY, raw_frame(b"\x91" * 60_000 + b"\xc0"))
        return outcome(client)


@stopped_by("error protocol")
def deep_nesting_in_a_field(target: Target) -> Outcome:
    header = msgspec.msgpack.encode({"type": "hello"})
    header = b"\x82" + header[1:] + b"\xa8software" + b"\x91" * 60_000 + b"\xc0"
    with target.websocket() as client:
        client.frame(BINARY, raw_frame(header))
        return outcome(client)


@stopped_by("error limit")
def header_that_claims_too_much(target: Target) -> Outcome:
    with target.websocket() as client:
        client.frame(BINARY, raw_frame(b"", header_length=(1 << 32) - 1))
        return outcome(client)


@stopped_by("error protocol")
def unknown_field(target: Target) -> Outcome:
    hello = {"type": "hello", "protocol_versions": [1], "software": "x", "admin": True}
    with target.websocket() as client:
        client.frame(BINARY, raw_frame(msgspec.msgpack.encode(hello)))
        return outcome(client)


@stopped_by("error protocol", "close 1008 flood")
def hundred_hellos(target: Target) -> Outcome:
    hello = frame(BINARY, encode(m.Hello(protocol_versions=list(PROTOCOL_VERSIONS), software="x")))
    with target.websocket() as client:
        for _ in range(100):
            with suppress(ConnectionError):
                client.send(hello)
        return outcome(client)


@stopped_by("error version")
def no_version_of_ours(target: Target) -> Outcome:
    with target.websocket() as client:
        client.frame(BINARY, encode(m.Hello(protocol_versions=[999], software="x")))
        return outcome(client)


@stopped_by("error version")
def version_that_was_never_released(target: Target) -> Outcome:
    with target.websocket() as client:
        client.frame(BINARY, encode(m.Hello(protocol_versions=[1], software="x")))
        return outcome(client)


@stopped_by("error base_model_mismatch")
def other_base_model(target: Target) -> Outcome:
    with target.greeted() as device:
        return device.say_anyway(device.opening(base_fingerprint="0" * 64))


@stopped_by("error unknown_target")
def groups_twice(target: Target) -> Outcome:
    with target.greeted() as device:
        return device.say_anyway(device.opening(groups=(*target.groups, *target.groups)))


@stopped_by("error limit")
def run_without_groups(target: Target) -> Outcome:
    with target.greeted() as device:
        return device.say_anyway(device.opening(groups=()))


@stopped_by("error unknown_target")
def forged_line_in_the_log(target: Target) -> Outcome:
    with target.greeted() as device:
        forged = TargetSpec("x\n12:00:00 session 00000000: closed\x1b[2J", 1)
        return device.say_anyway(device.opening(groups=(GroupSpec(0, 1, (forged,)),)))


@stopped_by("error ticket")
def forged_ticket(target: Target) -> Outcome:
    with target.greeted() as device:
        return device.say_anyway(device.opening(next_step=3, ticket=bytes(300)))


@stopped_by(GONE)
def session_of_another(target: Target) -> Outcome:
    with target.opened() as victim, target.greeted() as device:
        device.say(m.ResumeSession(session=victim.name, token=bytes(m.RESUME_TOKEN_BYTES), received=0))
        return GONE if isinstance(device.hear(), m.SessionGone) else "resumed"


@stopped_by("error protocol")
def session_before_hello(target: Target) -> Outcome:
    with target.websocket() as client:
        client.frame(BINARY, encode(m.CloseSession()))
        return outcome(client)


# -- in a session ----------------------------------------------------------------------------------------


@stopped_by("error protocol")
def claimed_shape_too_large(target: Target) -> Outcome:
    header = {
        "type": "embeddings",
        "step": 0,
        "micro_batch": 0,
        "mode": "train",
        "hidden_states": ["fp32", [2**31 - 1, 2**31 - 1], 0],
        "sequence_lengths": ["int32", [1], 0],
        "label_positions": ["int32", [1], 0],
    }
    with target.opened() as device:
        device.client.frame(BINARY, raw_frame(msgspec.msgpack.encode(header), bytes(64), seq=1))
        return device.outcome()


@stopped_by("error limit")
def too_many_tokens(target: Target) -> Outcome:
    with target.opened() as device:
        assert device.session.welcome is not None
        return device.say_anyway(device.embeddings(device.session.welcome.max_tokens + 1), seq=1)


@stopped_by("error protocol")
def wrong_width(target: Target) -> Outcome:
    with target.opened() as device:
        narrow = encode_floats(np.ones((TOKENS, 1), np.float32), "fp32")
        return device.say_anyway(device.embeddings(hidden_states=narrow), seq=1)


@stopped_by("error non_finite")
def nan(target: Target) -> Outcome:
    with target.opened() as device:
        return device.say_anyway(device.embeddings(value=np.nan), seq=1)


@stopped_by("error protocol")
def wrong_step(target: Target) -> Outcome:
    with target.opened() as device:
        return device.say_anyway(device.embeddings(step=7), seq=1)


@stopped_by("error protocol")
def wrong_group(target: Target) -> Outcome:
    with target.opened() as device:
        device.say(device.embeddings())
        asked = device.hear()
        assert isinstance(asked, m.GroupInput)
        deltas = tuple(
            encode_floats(np.ones((TOKENS, out.out_features), np.float32), "fp32")
            for out in target.groups[asked.group].targets
        )
        answer = m.GroupDelta(step=0, micro_batch=0, group=len(target.groups), deltas=deltas)
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
def gap_in_the_numbers(target: Target) -> Outcome:
    with target.opened() as device:
        return device.say_anyway(device.embeddings(), seq=2)


@stopped_by("error protocol")
def acknowledgement_of_the_future(target: Target) -> Outcome:
    with target.opened() as device:
        return device.say_anyway(device.embeddings(), seq=1, ack=9)


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
IDLE_ATTACKS: dict[str, IdleAttack] = {}
"""Each makes one connection that stays, and says what it goes on sending, a byte now and then."""


def idle_attack(make: IdleAttack) -> IdleAttack:
    IDLE_ATTACKS[make.__name__] = make
    return make


@idle_attack
def idle_socket(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    return held.enter_context(target.socket()), b""


@idle_attack
def idle_websocket(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    return held.enter_context(target.websocket()), b""


@idle_attack
def idle_after_hello(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    return held.enter_context(target.greeted()).client, b""


@idle_attack
def half_a_tls_hello(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    client = held.enter_context(target.socket())
    client.send(HALF_A_TLS_HELLO)
    return client, b""


@idle_attack
def slow_http(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    return held.enter_context(target.socket()), request(X="x" * 4000)


@idle_attack
def slow_frame(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    return held.enter_context(target.websocket()), frame(BINARY, bytes(60_000))


@idle_attack
def most_of_a_frame(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    """As much of the server's memory as a stranger gets: 64 KiB are allowed, and never end."""
    client = held.enter_context(target.greeted()).client
    client.send(frame(BINARY, bytes(60 << 10), length=64 << 10))
    return client, b""


IDLE_ATTACKS_IN_A_SESSION: dict[str, IdleAttack] = {}
"""The same with a session each, of which a server has only so many."""


def idle_attack_in_a_session(make: IdleAttack) -> IdleAttack:
    IDLE_ATTACKS_IN_A_SESSION[make.__name__] = make
    return make


@idle_attack_in_a_session
def silent_in_a_session(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    return held.enter_context(target.opened()).client, b""


@idle_attack_in_a_session
def silent_in_a_step(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    device = held.enter_context(target.opened())
    device.say(device.embeddings())
    device.hear()
    return device.client, b""


@idle_attack_in_a_session
def slow_in_a_step(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    device = held.enter_context(target.opened())
    return device.client, frame(BINARY, device.session.send(device.embeddings(30)))


@idle_attack_in_a_session
def repeats_itself_in_a_session(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    device = held.enter_context(target.opened())
    scores = WireTensor("fp32", np.ones(len(target.groups), np.float32))
    report = device.session.send(m.StepReport(step=0, scores=scores))
    device.client.frame(BINARY, report)
    assert isinstance(device.hear(), m.Signal)
    return device.client, frame(BINARY, report)


@idle_attack_in_a_session
def repeats_itself_in_a_step(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    device = held.enter_context(target.opened())
    begun = device.session.send(device.embeddings())
    device.client.frame(BINARY, begun)
    assert isinstance(device.hear(), m.GroupInput)
    return device.client, frame(BINARY, begun)


@idle_attack_in_a_session
def reads_nothing(target: Target, held: ExitStack) -> tuple[HostileClient, bytes]:
    device = held.enter_context(target.opened(receive_buffer=4096))
    assert device.session.welcome is not None
    device.say(device.embeddings(min(1000, device.session.welcome.max_sequence_length)))
    return device.client, b""


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
