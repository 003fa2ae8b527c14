"""What the server gave for each text, on the device's disk: a run asks for a text once, and trains from here.

One file: a header that says whose it is, then a record for each text, appended as it comes. A record has a mark, the
digest of its text, and checks of its own, so that a file that was cut off in the middle, by a full disk or a kill, is
good up to there, and a damaged record is only one text that is asked for again. It is read where it is needed, never
whole.

What is kept is what crossed, bit for bit: a run that goes on, or asks again, has the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np

from dlora.edge.files import open_own, remove_quietly, storage_errors
from dlora.protocol.choices import Send
from dlora.protocol.errors import CheckpointError, StorageError
from dlora.protocol.manifest import Manifest
from dlora.protocol.tensors import DTYPES, WireTensor, is_exponent, stored_width
from dlora.protocol.wire_codecs import CODECS, Codecs, TensorRole

from .cache_key import SEALED_BYTES, CacheKey
from .ends import LongArray

_MAGIC: Final = b"dlora-trunk-1\n\0\0"
_LENGTH: Final = struct.Struct("<I")
_MARK: Final = b"\0text\r\n\x1a"  # where a record begins
_RECORD: Final = struct.Struct("<8s32sIiI")  # mark, digest of the text, tokens, exponent, CRC-32 of these
_CRC_BYTES: Final = 4
_CHECK_BYTES: Final = 16
_LOOKED_THROUGH: Final = 1 << 20  # bytes at once, for a mark
_MAX_HEADER: Final = 1 << 16


class CacheOwner(msgspec.Struct, frozen=True, kw_only=True):
    """What hidden states depend on beside the text.

    Attributes:
        base_model: fingerprint; blocks: how many of the first were run; width: of what came out of them.
        embeddings: how the embeddings are stored and crossed, or ``token-ids``; codec: how the hidden states crossed.
        lora: where some of the blocks were run on the device: what else it depends on, such as a digest of the adapters
            in them, how their weights are stored, and the engine.
        key: the name of the key that all is encrypted with; none: it is not encrypted.
    """

    base_model: str
    blocks: int
    width: int
    embeddings: str
    codec: str
    lora: str = ""
    key: str = ""

    @classmethod
    def of(cls, manifest: Manifest, blocks: int, width: int, codecs: Codecs, send: Send) -> CacheOwner:
        """Of a run with this bundle."""
        embeddings = f"{manifest.embedding.dtype} as {codecs.of(TensorRole.EMBEDDINGS).dtype}"
        return cls(
            base_model=manifest.base_model.fingerprint,
            blocks=blocks,
            width=width,
            embeddings=send if send == "token-ids" else embeddings,
            codec=codecs.of(TensorRole.LAST_HIDDEN_STATES).dtype,
        )


class OtherKeyError(CheckpointError):
    """A cache that is encrypted with another key, or is not where it should be."""


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
        key: what texts and hidden states are encrypted with.
        warn: called with a line about what was damaged.

    Raises ``CheckpointError`` where the file is of another model, other blocks or another wire, or is none of ours, and
    ``StorageError``, for a link or a pipe in its place too.
    """

    def __init__(
        self,
        path: Path,
        owner: CacheOwner,
        *,
        limit: int,
        key: CacheKey | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.path = path
        self.owner = msgspec.structs.replace(owner, key="" if key is None else key.name)
        self.key = key
        self._limit = limit
        self._warn = warn
        self._codec = CODECS[owner.codec]
        self._places: dict[bytes, _Place] = {}
        self._checked: set[bytes] = set()
        self._file = open_own(path)
        try:
            start = self._read_header()  # before anything is changed: it may be somebody else's file
            with storage_errors(path):
                os.fchmod(self._file, 0o600)
            self._start = self._end = start or self._write_header()
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

    @property
    def tokens(self) -> int:
        """Of all texts that it has."""
        return sum(place.tokens for place in self._places.values())

    @property
    def room_for_records(self) -> int:
        """Bytes that all records together may have."""
        return self._limit - self._start

    @property
    def room(self) -> int:
        """Bytes that the file may grow by."""
        return self._limit - self._end

    def record_bytes(self, tokens: int) -> int:
        """What a text of so many tokens takes."""
        return record_bytes(self.owner.codec, tokens, self.owner.width, is_sealed=self.key is not None)

    def digest(self, ids: LongArray) -> bytes:
        """What the text of these tokens, int64 (tokens,), is called here."""
        return text_digest(ids, self.key)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    def get(self, digest: bytes, tokens: int) -> WireTensor | None:
        """The hidden states of a text (tokens, width); None where it does not have them, or they are damaged, or such
        as no server may send: whoever can write the file can make its checks."""
        place = self._places.get(digest)
        if place is None:
            return None
        tensor = self._read(digest, place) if place.tokens == tokens else None
        if tensor is None:
            self._warn(f"{self.path} is damaged in one place, whose text is asked for again")
            del self._places[digest]
            return None
        self._checked.add(digest)
        return tensor

    def _read(self, digest: bytes, place: _Place) -> WireTensor | None:
        head = _head(digest, place.tokens, place.exponent)
        with storage_errors(self.path):
            nbytes = self.record_bytes(place.tokens) - _RECORD.size - _CHECK_BYTES
            stored: bytes | None = os.pread(self._file, nbytes, place.offset)
            if stored is not None and digest not in self._checked:
                check = os.pread(self._file, _CHECK_BYTES, place.offset - _CHECK_BYTES)
                stored = stored if check == _check(head, stored) else None
        if stored is not None and len(stored) != nbytes:
            stored = None
        if stored is not None and self.key is not None:
            stored = self.key.open(stored, head)
        if stored is None or not is_exponent(place.exponent, self._codec.dtype):
            return None
        width = stored_width(self._codec.dtype, self.owner.width)
        data = np.frombuffer(stored, DTYPES[self._codec.dtype]).reshape(place.tokens, width)
        tensor = WireTensor(self._codec.dtype, data, place.exponent)
        return tensor if digest in self._checked or self._codec.is_finite(tensor) else None

    def add(self, digest: bytes, tensor: WireTensor) -> bool:
        """Keep the hidden states of a text; False where there is no room. Raises ``StorageError``; what was kept before
        stays."""
        record = _head(digest, tensor.shape[0], tensor.exponent)
        stored = tensor.data.tobytes()
        stored = stored if self.key is None else self.key.seal(stored, record)
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

    def forget(self, digest: bytes) -> None:
        """Let a text be kept again; a file that is opened again has the newest."""
        del self._places[digest]
        self._checked.discard(digest)

    def close(self) -> None:
        os.close(self._file)

    def _read_header(self) -> int:
        """Where records begin; 0 for a file that is empty, or whose header was cut off."""
        with storage_errors(self.path):
            size = os.fstat(self._file).st_size
            start = os.pread(self._file, len(_MAGIC) + _LENGTH.size, 0)
            if not start.strip(b"\0"):  # empty; or a power cut has left its length and nothing else
                return 0
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
        if owner.key != self.owner.key:
            if not owner.key:
                text = "is not encrypted; leave out --cache-key-file"
            else:
                text = f"is encrypted{' with another key' if self.owner.key else ''}; give its --cache-key-file"
            raise OtherKeyError(f"{self.path} {text}, or remove the file, and what was in it is computed again")
        if owner != self.owner:
            raise CheckpointError(
                f"{self.path} is of another base model, other blocks or another --wire-dtype or --send; remove it, or "
                "choose another --out"
            )
        return len(start) + length

    def _write_header(self) -> int:
        header = msgspec.json.encode(self.owner)
        whole = _MAGIC + _LENGTH.pack(len(header)) + header
        with storage_errors(self.path):
            os.ftruncate(self._file, 0)
            _write(self._file, whole, 0)
        return len(whole)

    def _find_records(self) -> None:
        """Index what is there. What is damaged is passed over, what was cut off at the end goes."""
        with storage_errors(self.path):
            size = os.fstat(self._file).st_size
            at = self._end
            while at < size:
                head = _read_head(os.pread(self._file, _RECORD.size, at))
                if head is None:
                    at = self._find_mark(at + 1, size)
                    continue
                digest, tokens, exponent = head
                start, end = at + _RECORD.size + _CHECK_BYTES, at + self.record_bytes(tokens)
                if end > size:
                    break
                if end > self._limit:  # smaller than before
                    os.ftruncate(self._file, self._end)
                    return
                if at > self._end:
                    self._warn(f"{self.path} is damaged in one place, whose text is asked for again")
                self._places[digest] = _Place(start, tokens, exponent)
                self._end = at = end
            if self._end < size:
                self._warn(f"{self.path} was cut off while it was written; what is missing is asked for again")
                os.ftruncate(self._file, self._end)

    def _find_mark(self, start: int, size: int) -> int:
        """Where the next record may begin, from ``start`` on; ``size`` where there is none."""
        while start < size:
            some = os.pread(self._file, _LOOKED_THROUGH, start)
            found = some.find(_MARK)
            if found >= 0:
                return start + found
            start += max(1, len(some) - len(_MARK) + 1)
        return size


def open_or_renew(
    path: Path,
    owner: CacheOwner,
    *,
    limit: int,
    key: CacheKey | None,
    warn: Callable[[str], None] = lambda _: None,
) -> TrunkCache:
    """``TrunkCache``, in place of one of something else, or a damaged one. Raises ``OtherKeyError`` and
    ``StorageError``."""
    try:
        return TrunkCache(path, owner, limit=limit, key=key, warn=warn)
    except OtherKeyError:
        raise
    except CheckpointError:
        remove_quietly(path)
        return TrunkCache(path, owner, limit=limit, key=key, warn=warn)


def record_bytes(codec: str, tokens: int, width: int, *, is_sealed: bool = False) -> int:
    """What the hidden states (tokens, width) of a text take in a cache, encrypted or not."""
    return _RECORD.size + _CHECK_BYTES + SEALED_BYTES * is_sealed + CODECS[codec].nbytes(tokens, width)


def most_bytes(texts: int, tokens: int, width: int, codec: str) -> int:
    """The most that a file of so many texts takes, of so many tokens in all."""
    heads = texts * (_RECORD.size + _CHECK_BYTES + SEALED_BYTES)
    return len(_MAGIC) + _LENGTH.size + _MAX_HEADER + heads + CODECS[codec].nbytes(tokens, width)


def text_digest(ids: LongArray, key: CacheKey | None = None) -> bytes:
    """SHA-256 of a text's tokens, int64 (tokens,); with a key, what nobody makes without it."""
    content = np.ascontiguousarray(ids, "<i8").tobytes()
    return hashlib.sha256(content).digest() if key is None else key.digest(content)


def _head(digest: bytes, tokens: int, exponent: int) -> bytes:
    """What stands before a record's check and tensor."""
    head = _RECORD.pack(_MARK, digest, tokens, exponent, 0)[:-_CRC_BYTES]
    return head + zlib.crc32(head).to_bytes(_CRC_BYTES, "little")


def _read_head(head: bytes) -> tuple[bytes, int, int] | None:
    """Digest, tokens and exponent; None where no record begins there."""
    if len(head) < _RECORD.size or zlib.crc32(head[:-_CRC_BYTES]).to_bytes(_CRC_BYTES, "little") != head[-_CRC_BYTES:]:
        return None
    mark, digest, tokens, exponent, _ = _RECORD.unpack(head)
    return (digest, tokens, exponent) if mark == _MARK and tokens else None


def _check(record: bytes, stored: bytes) -> bytes:
    return hashlib.blake2b(record + stored, digest_size=_CHECK_BYTES).digest()


def _write(file: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
