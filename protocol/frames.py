"""Messages to frames and back. A frame is a prefix, a padded header and then the tensors' raw bytes, aligned.

::

    offset  bytes
    0       prefix: header length n, seq, ack, checksum; uint32 little-endian each
    16      header: msgpack map of the message, n bytes; a tensor is [dtype, shape, exponent]
    16+n    zeros up to the next multiple of HEADER_BLOCK
    …       the tensors in the order of their descriptors, each at the next multiple of ALIGNMENT, zeros between

The header takes whole blocks, so that every message of a step has a size that a formula gives exactly
(``traffic.py``), and decoded tensors are aligned views of the frame. ``seq`` and ``ack`` belong to ``link.py``. The
checksum is there because a websocket without TLS carries a flipped bit to the end, into an adapter.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, Final, NamedTuple

import msgspec

from .errors import DamagedFrameError, RemoteProtocolError
from .messages import AnyMessage
from .tensors import WireTensor, parse_descriptor, tensors_of

HEADER_BLOCK: Final = 256
ALIGNMENT: Final = 64
MAX_HEADER_BYTES: Final = 1 << 22  # of open_session, which has groups and a ticket
MAX_SHORT_HEADER_BYTES: Final = 1 << 16  # of all others
_PREFIX: Final = struct.Struct("<IIII")
PREFIX_BYTES: Final = _PREFIX.size
_CHECKSUM: Final = slice(PREFIX_BYTES - 4, PREFIX_BYTES)


class Prefix(NamedTuple):
    """The first bytes of a frame.

    Attributes:
        seq: number of the frame in its session's direction, from 1; 0 for messages outside of a session.
        ack: the last ``seq`` that the sender has received; checksum: CRC-32 (IEEE 802.3) of all other bytes.
    """

    header_length: int
    seq: int
    ack: int
    checksum: int


def encode(message: AnyMessage, *, seq: int = 0, ack: int = 0) -> bytearray:
    """The frame of ``message``; each tensor is copied once, into its place."""
    header = _encoder.encode(message)
    tensors = tensors_of(message)
    offset = _round_up(PREFIX_BYTES + len(header), HEADER_BLOCK)
    offsets = []
    for tensor in tensors:
        offset = _round_up(offset, ALIGNMENT)
        offsets.append(offset)
        offset += tensor.nbytes
    frame = bytearray(offset)
    _PREFIX.pack_into(frame, 0, len(header), seq, ack, 0)
    frame[PREFIX_BYTES : PREFIX_BYTES + len(header)] = header
    view = memoryview(frame)
    for tensor, start in zip(tensors, offsets, strict=True):
        if tensor.nbytes:
            view[start : start + tensor.nbytes] = tensor.data.reshape(-1).view("u1").data
    return write_checksum(frame)


def write_checksum(frame: bytearray) -> bytearray:
    """Write the checksum into a frame that is otherwise complete; gives the same frame."""
    frame[_CHECKSUM] = _checksum(memoryview(frame)).to_bytes(4, "little")
    return frame


def read_prefix(frame: bytes | bytearray | memoryview) -> Prefix:
    """The prefix of a frame. Raises ``DamagedFrameError`` for one that is too short."""
    if len(frame) < PREFIX_BYTES:
        raise DamagedFrameError("a frame shorter than its prefix")
    return Prefix._make(_PREFIX.unpack_from(frame))


class _Type(msgspec.Struct):
    type: str


class Decoder:
    """Frames to messages. Not thread-safe: one for each connection."""

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(AnyMessage, dec_hook=self._tensor)
        self._frame = memoryview(b"")
        self._offset = 0

    def decode(self, frame: bytes | bytearray | memoryview) -> AnyMessage:
        """Decode one frame; its tensors are read-only views of it.

        Raises ``DamagedFrameError`` where the checksum differs, and ``RemoteProtocolError`` for anything else that
        ``encode`` would not have written.
        """
        view = memoryview(frame).toreadonly()
        prefix = read_prefix(view)
        if _checksum(view) != prefix.checksum:
            raise DamagedFrameError("a frame's checksum differs: it was damaged on its way")
        if prefix.header_length > MAX_HEADER_BYTES:
            raise RemoteProtocolError("header too long", code="limit")
        end = PREFIX_BYTES + prefix.header_length
        self._frame = view
        self._offset = _round_up(end, HEADER_BLOCK)
        if len(view) < self._offset:
            raise RemoteProtocolError("frame shorter than its header")
        _check_zeros(view, end, self._offset)
        try:
            if prefix.header_length > MAX_SHORT_HEADER_BYTES and _type_of(view[PREFIX_BYTES:end]) != "open_session":
                raise RemoteProtocolError("header too long", code="limit")
            message: AnyMessage = self._decoder.decode(view[PREFIX_BYTES:end])
        except RemoteProtocolError:
            raise
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise RemoteProtocolError(f"malformed header: {error}"[:300]) from None
        finally:
            self._frame = memoryview(b"")
        if self._offset != len(view):
            raise RemoteProtocolError("bytes left over at the end of a frame")
        return message

    def _tensor(self, kind: type, descriptor: Any) -> WireTensor:
        if kind is not WireTensor:
            raise NotImplementedError(kind)
        start = _round_up(self._offset, ALIGNMENT)
        if start > len(self._frame):
            raise RemoteProtocolError("a tensor starts after the end of its frame")
        _check_zeros(self._frame, self._offset, start)
        tensor, self._offset = parse_descriptor(descriptor, self._frame, start)
        return tensor


def frame_bytes(header_blocks: int, tensor_nbytes: list[int]) -> int:
    """Size of a frame from its header's blocks and its tensors' sizes, in bytes."""
    offset = header_blocks * HEADER_BLOCK
    for nbytes in tensor_nbytes:
        offset = _round_up(offset, ALIGNMENT) + nbytes
    return offset


def _type_of(header: memoryview) -> str:
    """The type alone: descriptors are decoded before they are checked, and an empty map is 64 bytes in memory."""
    return msgspec.msgpack.decode(header, type=_Type).type


def _checksum(frame: memoryview) -> int:
    return zlib.crc32(frame[PREFIX_BYTES:], zlib.crc32(frame[: _CHECKSUM.start]))


def _describe(value: Any) -> Any:
    if isinstance(value, WireTensor):
        return [value.dtype, list(value.shape), value.exponent]
    raise NotImplementedError(type(value))


def _round_up(offset: int, multiple: int) -> int:
    return -(-offset // multiple) * multiple


def _check_zeros(view: memoryview, start: int, end: int) -> None:
    if end > start and any(view[start:end]):
        raise RemoteProtocolError("padding is not zero")


_encoder: Final = msgspec.msgpack.Encoder(enc_hook=_describe)
