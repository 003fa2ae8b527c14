"""Event files as TensorBoard reads them: records of protocol buffers, of which scalars need five fields.

::

    record   length (uint64), its masked CRC-32C (uint32), the event, its masked CRC-32C; little-endian
    Event    1 wall_time (double)   2 step (varint)   3 file_version (string)   5 summary (Summary)
    Summary  1 value (Value), repeated
    Value    1 tag (string)   2 simple_value (float)

Written here, and not by tensorboardX: that loads torch wherever it is installed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from dlora.edge.files import storage_errors, write_whole

_VERSION: Final = b"brain.Event:2"
_POLYNOMIAL: Final = 0x82F63B78  # Castagnoli's, reversed
_MASK: Final = 0xA282EAD8


def _table() -> list[int]:
    found = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
        found.append(byte)
    return found


_TABLE: Final = _table()


class EventFile:
    """One event file, written as events come.

    Raises ``StorageError`` where it cannot be made or written.
    """

    def __init__(self, path: Path, wall_time: float) -> None:
        """``wall_time``: seconds since 1970, as everywhere here."""
        self._path = path
        with storage_errors(path):
            self._file = path.open("wb", buffering=0)
        self._write(_double(1, wall_time) + _bytes(3, _VERSION))

    def add(self, step: int, scalars: Mapping[str, float], wall_time: float) -> None:
        """Scalars of one step, by their tags; as float32, which is what the file takes."""
        values = b"".join(_bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in scalars.items())
        self._write(_double(1, wall_time) + _key(2, 0) + _varint(step) + _bytes(5, values))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        record = b"".join((length, _checksum(length), event, _checksum(event)))
        with storage_errors(self._path):
            write_whole(self._file, record)


def _checksum(content: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF)


def _key(field: int, wire_type: int) -> bytes:
    return bytes((field << 3 | wire_type,))


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _double(field: int, value: float) -> bytes:
    return _key(field, 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    with np.errstate(over="ignore"):  # what is too large for it becomes infinity
        stored: bytes = np.array(value, "<f4").tobytes()
    return _key(field, 5) + stored


def _bytes(field: int, content: bytes) -> bytes:
    return _key(field, 2) + _varint(len(content)) + content
