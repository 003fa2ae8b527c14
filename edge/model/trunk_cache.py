"""What the server gave for each text, on the device's disk: a run asks for a text once, and trains from here.

One file: a header that says whose it is, then a record for each text, appended as it comes. A record has the digest of
its text and a check of its own, so that a file that was cut off in the middle, by a full disk or a kill, is good up to
there, and a damaged record is only one text that is asked for again. It is read where it is needed, never whole.

What is kept is what crossed, bit for bit: a run that goes on, or asks again, has the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np

from dlora.edge.files import remove_quietly, storage_errors
from dlora.protocol.choices import Send
from dlora.protocol.errors import CheckpointError, StorageError
from dlora.protocol.tensors import DTYPES, SCALE_BYTES, WireTensor
from dlora.protocol.wire_codecs import CODECS, Codecs, TensorRole

from .ends import LongArray

_MAGIC: Final = b"dlora-trunk-1\n\0\0"
_LENGTH: Final = struct.Struct("<I")
_RECORD: Final = struct.Struct("<32sIi")  # digest of the text, tokens, exponent
_CHECK_BYTES: Final = 16
_MAX_HEADER: Final = 1 << 16


class CacheOwner(msgspec.Struct, frozen=True, kw_only=True):
    """What hidden states depend on beside the text.

    Attributes:
        base_model: fingerprint; blocks: how many of the first were run; width: of what came out of them.
        embeddings: how the embeddings crossed, or ``token-ids``; codec: how the hidden states did.
    """

    base_model: str
    blocks: int
    width: int
    embeddings: str
    codec: str

    @classmethod
    def of(cls, base_model: str, blocks: int, width: int, codecs: Codecs, send: Send) -> CacheOwner:
        embeddings = send if send == "token-ids" else codecs.of(TensorRole.EMBEDDINGS).dtype
        codec = codecs.of(TensorRole.LAST_HIDDEN_STATES).dtype
        return cls(base_model=base_model, blocks=blocks, width=width, embeddings=embeddings, codec=codec)


class _Place(NamedTuple):
    """Where a record's tensor lies."""

    offset: int
    tokens: int
    exponent: int


class TrunkCache:
    """Hidden states by text.

    Args:
        path: made where it is not there.
        limit: of the file, in bytes; what does not fit is not kept, and cut off where it is there.
        warn: called with a line about what was damaged.

    Raises ``CheckpointError`` where the file is of another model, other blocks or another wire, or is none of ours, and
    ``StorageError``.
    """

    def __init__(
        self, path: Path, owner: CacheOwner, *, limit: int, warn: Callable[[str], None] = lambda _: None
    ) -> None:
        self.path = path
        self._owner = owner
        self._limit = limit
        self._warn = warn
        self._codec = CODECS[owner.codec]
        self._places: dict[bytes, _Place] = {}
        self._checked: set[bytes] = set()
        with storage_errors(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            self._end = self._read_header() or self._write_header()
            self._find_records()
        except BaseException:
            os.close(self._file)
            raise

    def __len__(self) -> int:
        """How many texts it has."""
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self._end

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    def get(self, digest: bytes) -> WireTensor | None:
        """The hidden states of a text (tokens, width); None where it does not have them, or they are damaged."""
        place = self._places.get(digest)
        if place is None:
            return None
        with storage_errors(self.path):
            stored = os.pread(self._file, self._codec.nbytes(place.tokens, self._owner.width), place.offset)
            if digest not in self._checked:
                check = os.pread(self._file, _CHECK_BYTES, place.offset - _CHECK_BYTES)
                if check != _check(_RECORD.pack(digest, place.tokens, place.exponent), stored):
                    self._warn(f"{self.path} is damaged in one place, whose text is asked for again")
                    del self._places[digest]
                    return None
                self._checked.add(digest)
        width = self._owner.width + (SCALE_BYTES if self._codec.dtype == "int8" else 0)
        data = np.frombuffer(stored, DTYPES[self._codec.dtype]).reshape(place.tokens, width)
        return WireTensor(self._codec.dtype, data, place.exponent)

    def add(self, digest: bytes, tensor: WireTensor) -> bool:
        """Keep the hidden states of a text; False where there is no room. Raises ``StorageError``; what was kept before
        stays."""
        stored = tensor.data.tobytes()
        record = _RECORD.pack(digest, tensor.shape[0], tensor.exponent)
        whole = record + _check(record, stored) + stored
        if digest in self._places:
            return True
        if self._end + len(whole) > self._limit:
            return False
        try:
            with storage_errors(self.path):
                _write(self._file, whole, self._end)
        except StorageError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise StorageError(f"{error}, or lower --cache-mb") from error.__cause__
        self._places[digest] = _Place(self._end + len(record) + _CHECK_BYTES, tensor.shape[0], tensor.exponent)
        self._checked.add(digest)
        self._end += len(whole)
        return True

    def close(self) -> None:
        os.close(self._file)

    def remove(self) -> None:
        """Close it, and delete the file."""
        self.close()
        remove_quietly(self.path)

    def _read_header(self) -> int:
        """Where records begin; 0 for a file that is empty, or whose header was cut off."""
        with storage_errors(self.path):
            size = os.fstat(self._file).st_size
            start = os.pread(self._file, len(_MAGIC) + _LENGTH.size, 0)
            if not _MAGIC.startswith(start[: len(_MAGIC)]):
                raise CheckpointError(f"{self.path} is no cache of hidden states; choose another --out")
            if len(start) < len(_MAGIC) + _LENGTH.size:
                return 0
            length: int = _LENGTH.unpack(start[len(_MAGIC) :])[0]
            if length > _MAX_HEADER:
                raise CheckpointError(f"{self.path} is damaged; remove it, and its texts are asked for again")
            header = os.pread(self._file, length, len(start))
        if len(start) + length > size:
            return 0
        try:
            owner = msgspec.json.decode(header, type=CacheOwner)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise CheckpointError(f"{self.path} is damaged; remove it, and its texts are asked for again") from None
        if owner != self._owner:
            raise CheckpointError(
                f"{self.path} is of another base model, other blocks or another --wire-dtype or --send; remove it, or "
                "choose another --out"
            )
        return len(start) + length

    def _write_header(self) -> int:
        header = msgspec.json.encode(self._owner)
        whole = _MAGIC + _LENGTH.pack(len(header)) + header
        with storage_errors(self.path):
            os.ftruncate(self._file, 0)
            _write(self._file, whole, 0)
        return len(whole)

    def _find_records(self) -> None:
        """Index what is there, and cut off a record that is not whole."""
        with storage_errors(self.path):
            size = os.fstat(self._file).st_size
            while self._end < size:
                record = os.pread(self._file, _RECORD.size, self._end)
                if len(record) < _RECORD.size:
                    break
                digest, tokens, exponent = _RECORD.unpack(record)
                start = self._end + _RECORD.size + _CHECK_BYTES
                end = start + self._codec.nbytes(tokens, self._owner.width)
                if not tokens or end > size:
                    break
                if end > self._limit:  # smaller than before
                    os.ftruncate(self._file, self._end)
                    return
                self._places[digest] = _Place(start, tokens, exponent)
                self._end = end
            if self._end < size:
                self._warn(f"{self.path} was cut off while it was written; what is missing is asked for again")
                os.ftruncate(self._file, self._end)


def text_digest(ids: LongArray) -> bytes:
    """SHA-256 of a text's tokens, int64 (tokens,)."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).digest()


def _check(record: bytes, stored: bytes) -> bytes:
    return hashlib.blake2b(record + stored, digest_size=_CHECK_BYTES).digest()


def _write(file: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
