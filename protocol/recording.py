"""``frames.bin``: the frames of a conversation as they crossed, in the order in which one side sent and received them.

::

    offset  bytes
    0       MAGIC, 16 bytes
    16      the recording's id, 16 random bytes, which the truth that belongs to it has too
    32      records, one after another:
              time in seconds, float64; frame length, uint32; direction, uint8: 0 up (device to server), 1 down
              the frame, as docs/reference/protocol.md has it

All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from .errors import DataError
from .files import read_regular

FRAMES_DIRECTORY: Final = "frames"
FRAMES_FILE: Final = "frames.bin"
TRUTH_DIRECTORY: Final = "truth"
TRUTH_FILE: Final = "truth.safetensors"
TRUTH_FORMAT: Final = 1
TOKENIZER_FILE: Final = "tokenizer.json"
ID_BYTES: Final = 16
MAGIC: Final = b"dlora frames 1\0\0"
_RECORD: Final = struct.Struct("<dIB")


class RecordedFrame(NamedTuple):
    """One frame, its ``time`` in seconds since the recording began; ``up``: from the device to the server."""

    time: float
    up: bool
    frame: memoryview


class FramesWriter:
    """Writes a recording; ``nbytes`` is its size so far."""

    def __init__(self, file: BinaryIO, recording_id: bytes) -> None:
        assert len(recording_id) == ID_BYTES
        self._file = file
        self.nbytes = file.write(MAGIC + recording_id)

    def add(self, time: float, frame: bytes | bytearray, *, up: bool) -> None:
        """Write one frame. Raises ``OSError``."""
        self.nbytes += self._file.write(_RECORD.pack(time, len(frame), not up))
        self.nbytes += self._file.write(frame)


class Recording(NamedTuple):
    """What ``read_recording`` found."""

    id: bytes
    frames: list[RecordedFrame]


def find_recorded(directory: Path, part: str, file: str) -> Path:
    """Where ``file`` is, there or not: in ``directory``, or in its ``part``; ``directory`` may be the file itself."""
    if directory.is_file():
        return directory
    path = directory / file
    return directory / part / file if not path.is_file() and (directory / part).is_dir() else path


def read_recording(directory: Path) -> Recording:
    """The frames in ``directory``, or in its ``frames``; it may be the file itself. Raises ``DataError`` where there
    are none, and where the file is no recording or is torn."""
    path = find_recorded(directory, FRAMES_DIRECTORY, FRAMES_FILE)
    try:
        content = read_regular(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); record some with dlora-edge train, evaluate or generate "
            "--record DIR, and give DIR/frames"
        ) from None
    if len(content) < len(MAGIC) + ID_BYTES or not content.startswith(MAGIC):
        raise DataError(f"{path} is no recording of frames of this version; record them again")
    view = memoryview(content)
    return Recording(content[len(MAGIC) : len(MAGIC) + ID_BYTES], list(_records(path, view, len(MAGIC) + ID_BYTES)))


def _records(path: Path, view: memoryview, offset: int) -> Iterator[RecordedFrame]:
    while offset < len(view):
        start = offset + _RECORD.size
        if start > len(view):
            raise _torn(path, offset)
        time, length, down = _RECORD.unpack_from(view, offset)
        end = start + length
        if end > len(view) or down > 1:
            raise _torn(path, offset)
        yield RecordedFrame(time, not down, view[start:end])
        offset = end


def _torn(path: Path, offset: int) -> DataError:
    return DataError(f"{path} is torn: what begins at byte {offset:,} is no whole frame; copy or record it again")
