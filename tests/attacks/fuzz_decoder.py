"""Fuzz target: a frame from the wire. A message, or ``RemoteProtocolError``."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Final

import conversations as c
from attacks.fuzz_target import Target, decode_msgpack, encode_msgpack, mutate_bytes, mutate_value

from dlora.protocol import messages as m
from dlora.protocol.errors import RemoteProtocolError
from dlora.protocol.frames import HEADER_BLOCK, PREFIX_BYTES, Decoder, encode, write_checksum
from dlora.protocol.tensors import tensors_of

RESUMING: Final = (c.resume_session(), c.session_resumed(), m.SessionGone())
EXAMPLES: Final[tuple[m.AnyMessage, ...]] = (
    c.hello(), c.welcome(), c.open_session(wire_dtype="fp16", ticket=b"signed"), c.session_opened(), *RESUMING,
    *c.forward(), *c.backward(), c.embeddings(hidden_states=c.floats(c.TOKENS, c.WIDTH, dtype="fp16")), c.report(),
    c.signal(), m.CloseSession(), c.error(), m.Error(code="busy", message="", retryable=True, retry_after_s=5.0),
)  # fmt: skip
_DECODER: Final = Decoder()


def target(_directory: Path) -> Target:
    """The target; its corpus is one frame of each message."""
    return Target("decoder", tuple(bytes(encode(message)) for message in EXAMPLES), mutate, run, sealed)


def run(data: bytes) -> None:
    try:
        message = _DECODER.decode(data)
    except RemoteProtocolError:
        return
    assert sum(tensor.nbytes for tensor in tensors_of(message)) <= len(data)
    assert _DECODER.decode(encode(message)) == message


def mutate(data: bytes, rng: Random) -> bytes:
    """Change the header's values, the header's bytes, or anything, and write lengths and checksum anew."""
    kind = rng.randrange(5)
    if kind == 0 or len(data) < PREFIX_BYTES:
        return sealed(mutate_bytes(data, rng))
    length = int.from_bytes(data[:4], "little")
    header, tensors = data[PREFIX_BYTES : PREFIX_BYTES + length], data[_padded(PREFIX_BYTES + length) :]
    if kind == 1:
        header = mutate_bytes(header, rng)
    else:
        try:
            header = encode_msgpack(mutate_value(decode_msgpack(header), rng))
        except (ValueError, TypeError, OverflowError):
            header = mutate_bytes(header, rng)
    if kind == 2:
        tensors = mutate_bytes(tensors, rng) if rng.random() < 0.5 else _other_words(tensors, rng)
    if kind == 3:
        tensors = tensors.ljust(rng.choice((64, 256, 1024, 4096)), b"\0")
    start = len(header).to_bytes(4, "little") + data[4:PREFIX_BYTES] + header
    return sealed(start.ljust(_padded(len(start)), b"\0") + tensors)


def sealed(frame: bytes) -> bytes:
    """With a checksum that fits, where there is room for one."""
    return bytes(write_checksum(bytearray(frame))) if len(frame) >= PREFIX_BYTES else frame


def _other_words(tensors: bytes, rng: Random) -> bytes:
    """Whole numbers, NaN and infinity, where numbers stand."""
    changed = bytearray(tensors)
    for _ in range(rng.randrange(1, 5)):
        at = 4 * rng.randrange(len(changed) // 4 + 1)
        number = rng.choice((0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 2, 0x7FC00000, 0x7F800000, 0x7C007C00))
        changed[at : at + 4] = number.to_bytes(4, "little")
    return bytes(changed[: len(tensors)])


def _padded(length: int) -> int:
    return -(-length // HEADER_BLOCK) * HEADER_BLOCK
