"""Messages to frames and back. A frame is a padded header and then the tensors' raw bytes, aligned.

::

    offset  bytes
    0       header length n, uint32 little-endian
    4       header: msgpack map of the message, n bytes; a tensor is [dtype, shape, exponent]
    4+n     zeros up to the next multiple of HEADER_BLOCK
    …       the tensors in the order of their descriptors, each at the next multiple of ALIGNMENT, zeros between

The header takes whole blocks, so that every message of a step has a size that a formula gives exactly
(``traffic.py``), and decoded tensors are aligned views of the frame.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from .errors import RemoteProtocolError
from .messages import AnyMessage, tensors_of
from .tensors import WireTensor, parse_descriptor

HEADER_BLOCK: Final = 256
ALIGNMENT: Final = 64
MAX_HEADER_BYTES: Final = 1 << 22


def encode(message: AnyMessage) -> bytearray:
    """The frame of ``message``; each tensor is copied once, into its place."""
    header = _encoder.encode(message)
    tensors = tensors_of(message)
    offset = _round_up(4 + len(header), HEADER_BLOCK)
    offsets = []
    for tensor in tensors:
        offset = _round_up(offset, ALIGNMENT)
        offsets.append(offset)
        offset += tensor.nbytes
    frame = bytearray(offset)
    frame[0:4] = len(header).to_bytes(4, "little")
    frame[4 : 4 + len(header)] = header
    view = memoryview(frame)
    for tensor, start in zip(tensors, offsets, strict=True):
        if tensor.nbytes:
            view[start : start + tensor.nbytes] = tensor.data.reshape(-1).view("u1").data
    return frame


class Decoder:
    """Frames to messages. Not thread-safe: one for each connection."""

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(AnyMessage, dec_hook=self._tensor)
        self._frame = memoryview(b"")
        self._offset = 0

    def decode(self, frame: bytes | bytearray | memoryview) -> AnyMessage:
        """Decode one frame; its tensors are read-only views of it.

        Raises ``RemoteProtocolError`` for anything that ``encode`` would not have written.
        """
        view = memoryview(frame).toreadonly()
        if len(view) < 4:
            raise RemoteProtocolError("frame shorter than its header length")
        length = int.from_bytes(view[:4], "little")
        if length > MAX_HEADER_BYTES:
            raise RemoteProtocolError("header too long", code="limit")
        self._frame = view
        self._offset = _round_up(4 + length, HEADER_BLOCK)
        if len(view) < self._offset:
            raise RemoteProtocolError("frame shorter than its header")
        _check_zeros(view, 4 + length, self._offset)
        try:
            message: AnyMessage = self._decoder.decode(view[4 : 4 + length])
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
