"""Bearer tokens of devices, in one SQLite file of hashes.

A token is ``dlora_<id>_<secret>``: 8 hex digits that name it in lists and logs, and 43 URL-safe characters, which
are 256 random bits. Of the secret only its SHA-256 is kept. A slow, salted hash is for passwords, which can be
guessed; 256 random bits cannot, however fast the hash, and a slow one would let strangers burn the server's CPU.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dlora.protocol.errors import RefusedError, StorageError, UsageError
from dlora.protocol.messages import ErrorCode

FILE_NAME: Final = "tokens.sqlite"
# Better to refuse a device for now than to keep it, and those behind it, waiting.
LOCK_TIMEOUT_S: Final = 2.0
_TOKEN: Final = re.compile(r"dlora_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
_DEVICE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PRUNED: Final = 1  # SQLite's user_version of a file that had tokens whose records are deleted
_RECORD: Final = "id, device, created, expires, revoked"
_TABLE: Final = """
CREATE TABLE IF NOT EXISTS tokens (
    id TEXT PRIMARY KEY, device TEXT NOT NULL, sha256 BLOB NOT NULL,
    created REAL NOT NULL, expires REAL, revoked REAL
)
"""


@dataclass(frozen=True)
class BearerTokenRecord:
    """What is known of a token, without its secret. Times are seconds since 1970, UTC.

    Attributes:
        expires: None where it never does.
        revoked: when it was revoked; None where it was not.
    """

    id: str
    device: str
    created: float
    expires: float | None
    revoked: float | None

    def state(self, now: float) -> str:
        """``revoked``, ``expired`` or ``valid``."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "valid"


class WallClock:
    """Seconds since 1970 that never go back while the process runs: a clock that is set back revives no token.

    One that is set ahead counts at once, and only until it is right again.
    """

    def __init__(self) -> None:
        self._began = time.time() - time.monotonic()

    def __call__(self) -> float:
        return max(time.time(), self._began + time.monotonic())


class BearerTokenStore:
    """The tokens of one server.

    Nothing is cached and every call opens the file anew, so what another process creates or revokes, even by
    replacing the file, holds from the next call on, in any thread.

    Args:
        path: the file; made on first use, readable by its owner only.
        clock: seconds since 1970; None: a ``WallClock``.

    Every method raises ``StorageError`` where the file is damaged, locked for long, or cannot be written.
    """

    def __init__(self, path: Path, clock: Callable[[], float] | None = None) -> None:
        self.path = path
        self._clock = clock or WallClock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise StorageError(f"cannot keep tokens in {path}: {error.strerror}; choose --state-dir") from None
        with self._open() as database:
            database.execute(_TABLE)

    def create(self, device: str, expires_s: float | None) -> str:
        """A new token for ``device``, valid for ``expires_s`` seconds or for ever. It cannot be had again.

        Raises ``UsageError`` where that is no name for a device.
        """
        if _DEVICE.fullmatch(device) is None:
            raise UsageError(f"--device {device[:80]!r} is no name; write 1 to 64 letters, digits, dots, '-' and '_'")
        name, secret, now = secrets.token_hex(4), secrets.token_urlsafe(32), self._clock()
        expires = None if expires_s is None else now + expires_s
        with self._open() as database:
            database.execute(
                "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, NULL)", (name, device, _digest(secret), now, expires)
            )
        return f"dlora_{name}_{secret}"

    def verify(self, token: str) -> BearerTokenRecord:
        """The record of a valid token.

        Raises ``RefusedError`` with ``token_wrong``, ``token_expired`` or ``token_revoked``; the last two
        only to who has the whole secret.
        """
        parts = _TOKEN.fullmatch(token)
        if parts is None:
            raise _wrong()
        name, secret = parts.groups()
        with self._open() as database:
            row = database.execute(f"SELECT {_RECORD}, sha256 FROM tokens WHERE id = ?", (name,)).fetchone()
        # An unknown id costs the same hash and comparison, so time does not tell which ids exist.
        known = row[-1] if row else bytes(32)
        if not hmac.compare_digest(_digest(secret), known) or row is None:
            raise _wrong()
        return self._check(BearerTokenRecord(*row[:-1]))

    def check(self, token_ids: Collection[str]) -> dict[str, RefusedError]:
        """What ``verify`` would raise now, of tokens that verified before, for those that do not any more."""
        records = {record.id: record for record in self.all()}
        ended = {}
        for token_id in token_ids:
            try:
                if token_id not in records:
                    raise _wrong()
                self._check(records[token_id])
            except RefusedError as error:
                ended[token_id] = error
        return ended

    def all(self) -> list[BearerTokenRecord]:
        """All tokens whose records are kept, oldest first."""
        with self._open() as database:
            rows = database.execute(f"SELECT {_RECORD} FROM tokens ORDER BY created, id")
            return [BearerTokenRecord(*row) for row in rows]

    def any(self) -> bool:
        """Whether a token was ever created. Revoked and pruned ones count: without any the door is open."""
        with self._open() as database:
            kept = database.execute("SELECT 1 FROM tokens LIMIT 1").fetchone()
            (pruned,) = database.execute("PRAGMA user_version").fetchone()
            return kept is not None or pruned == _PRUNED

    def ids_of(self, device_or_id: str) -> list[str]:
        """The ids of all tokens of a device, revoked ones as well, or the one."""
        return [record.id for record in self.all() if device_or_id in (record.id, record.device)]

    def revoke(self, device_or_id: str) -> int:
        """Revoke a token by its id, or all tokens of a device; how many were not revoked before."""
        with self._open() as database:
            return database.execute(
                "UPDATE tokens SET revoked = ? WHERE (id = ? OR device = ?) AND revoked IS NULL",
                (self._clock(), device_or_id, device_or_id),
            ).rowcount

    def prune(self) -> int:
        """Delete the records of tokens that are revoked or have expired; how many.

        In the same transaction the file is marked as one that had tokens, which is what ``any`` asks for.
        """
        with self._open() as database:
            pruned = database.execute(
                "DELETE FROM tokens WHERE revoked IS NOT NULL OR expires <= ?", (self._clock(),)
            ).rowcount
            if pruned:
                database.execute(f"PRAGMA user_version = {_PRUNED}")
            return pruned

    def _check(self, record: BearerTokenRecord) -> BearerTokenRecord:
        state = record.state(self._clock())
        if state != "valid":
            code = ErrorCode.TOKEN_REVOKED if state == "revoked" else ErrorCode.TOKEN_EXPIRED
            text = f"the token {record.id} of {record.device} is {state}; ask the server's operator for a new one"
            raise RefusedError(text, code)
        return record

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A transaction of its own."""
        try:
            # mode=rw: a file that went away is an error, and no reason to begin an empty one.
            uri = f"{self.path.absolute().as_uri()}?mode=rw"
            with closing(sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT_S)) as database, database:
                yield database
        except sqlite3.OperationalError as error:
            raise StorageError(f"cannot use the tokens in {self.path}: {error}; check disk and permissions") from None
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"the tokens in {self.path} are damaged ({error}); restore the file, or move it away"
            ) from None


def _wrong() -> RefusedError:
    text = "the token is not one of this server's; check it, or ask the server's operator for a new one"
    return RefusedError(text, ErrorCode.TOKEN_WRONG)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
