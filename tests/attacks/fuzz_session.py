"""Fuzz target: a whole conversation. Each frame gives a message or ``RemoteProtocolError``, and no rule is broken.

The input is a byte of settings and then records: who speaks, a length, a frame. A refused frame must leave the
session as it was, and what is accepted must be safe to compute with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Final

import conversations as c
from attacks import fuzz_decoder
from attacks.fuzz_decoder import RESUMING
from attacks.fuzz_target import Target

from dlora.protocol import messages as m
from dlora.protocol.errors import LocalProtocolError, RemoteProtocolError
from dlora.protocol.frames import PREFIX_BYTES, Decoder, encode, read_prefix
from dlora.protocol.session import NUMBERED, Session
from dlora.protocol.states import TRANSITIONS, Side
from dlora.protocol.tensors import tensors_of
from dlora.protocol.wire_codecs import is_finite

OPENED: Final = 2  # the settings' bit for a session that is open already; the lowest bit is the role
AS_IT_IS, NUMBERED_ANEW, OURS = range(3)
MAX_RECORDS: Final = 64
ROLES: Final = (Side.EDGE, Side.CLOUD)
OPENING: Final = c.opening()
_DECODER: Final = Decoder()
_SENDERS: Final = {kind: role for row in TRANSITIONS.values() for kind, (role, _) in row.items()}


def target(_directory: Path) -> Target:
    """The target; its corpus is two steps, and the handshakes, as each side sees them."""
    steps = [
        *c.forward(0), *c.backward(0), c.report(0), c.embeddings(1, mode="evaluate"), c.signal(0),
        c.group_input(1), c.group_delta(1), c.labelled(1), *c.forward(1, live=(0, 1)), *c.backward(1, live=(0, 1)),
        c.report(1), c.signal(1, b"\0\1"), *c.forward(2, live=(1, 2), gradients=0), m.CloseSession(),
    ]  # fmt: skip
    resume, resumed, gone = RESUMING
    resuming = [c.hello(), c.welcome(), resume, gone, *OPENING[2:]]
    talks = ((OPENED, steps), (0, resuming), (0, [c.hello(), c.welcome(), resume, resumed]))
    corpus = tuple(
        bytes([index | opened]) + _records(talk, role) for index, role in enumerate(ROLES) for opened, talk in talks
    )
    return Target("session", corpus, mutate, run, sealed)


def run(data: bytes) -> None:
    settings = data[0] if data else 0
    role = ROLES[settings & 1]
    session = Session(role)
    if settings & OPENED:
        for message in OPENING:
            session.send(message) if _sender(message) is role else session.receive(encode(message))
    for kind, frame in records(data[1:]):
        if kind == OURS:
            _speak(session, frame)
        else:
            _listen(session, _numbered_anew(session, frame) if kind == NUMBERED_ANEW else frame)


def _speak(session: Session, frame: bytes) -> None:
    try:
        session.send(_DECODER.decode(frame))
    except (RemoteProtocolError, LocalProtocolError):
        return


def _listen(session: Session, frame: bytes) -> None:
    before = c.everything(session)
    try:
        message = session.receive(frame)
    except RemoteProtocolError:
        assert c.everything(session) == before
        return
    if message is None:
        return
    assert all(is_finite(tensor) for tensor in tensors_of(message))
    if isinstance(message, m.Embeddings):
        tokens = message.hidden_states.shape[0]
        positions, lengths = message.label_positions.data.tolist(), message.sequence_lengths.data.tolist()
        assert all(0 <= position < tokens for position in positions)
        assert sorted(set(positions)) == positions
        assert sum(lengths) == tokens


def mutate(data: bytes, rng: Random) -> bytes:
    """Drop, repeat, move or change one record."""
    found = list(records(data[1:]))
    if not found:
        return data + fuzz_decoder.mutate(b"", rng)
    settings = rng.randrange(4) if rng.random() < 0.1 else data[0]
    at = rng.randrange(len(found))
    kind, frame = found[at]
    match rng.randrange(7):
        case 0:
            del found[at]
        case 1:
            found.insert(at, found[at])
        case 2:
            found.insert(rng.randrange(len(found)), found.pop(at))
        case 3:
            found[at] = (rng.randrange(3), frame)
        case _:
            found[at] = (kind, fuzz_decoder.mutate(frame, rng))
    return bytes([settings]) + b"".join(_record(*record) for record in found)


def sealed(data: bytes) -> bytes:
    """Each record's frame with a checksum that fits."""
    return data[:1] + b"".join(_record(kind, fuzz_decoder.sealed(frame)) for kind, frame in records(data[1:]))


def _records(messages: Sequence[m.AnyMessage], role: Side) -> bytes:
    return b"".join(
        _record(OURS if _sender(message) is role else NUMBERED_ANEW, bytes(encode(message))) for message in messages
    )


def _sender(message: m.AnyMessage) -> Side:
    return _SENDERS.get(type(message), Side.CLOUD)


def _record(kind: int, frame: bytes) -> bytes:
    return bytes([kind]) + len(frame).to_bytes(4, "little") + frame


def records(data: bytes) -> Iterator[tuple[int, bytes]]:
    for _ in range(MAX_RECORDS):
        if len(data) < 5:
            return
        length = int.from_bytes(data[1:5], "little")
        yield data[0] % 3, data[5 : 5 + length]
        data = data[5 + length :]


def _numbered_anew(session: Session, frame: bytes) -> bytes:
    """With the number that comes next, if it has one; so that a dropped record does not end the conversation."""
    try:
        numbered = isinstance(_DECODER.decode(frame), NUMBERED)
    except RemoteProtocolError:
        return frame
    seq, ack = (session.link.received + 1, session.link.sent) if numbered else (0, 0)
    prefix = read_prefix(frame)
    numbers = struct.pack("<IIII", prefix.header_length, seq, ack, 0)
    return fuzz_decoder.sealed(numbers + frame[PREFIX_BYTES:])
