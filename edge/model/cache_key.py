"""A user's key, with which what is kept on the disk is encrypted: XChaCha20-Poly1305 of libsodium, by PyNaCl.

PyNaCl is optional: the device does without it until somebody gives a key.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dlora.edge.files import read_secret
from dlora.protocol.command import missing_extra
from dlora.protocol.errors import UsageError

OPTION: Final = "--cache-key-file"
SEALED_BYTES: Final = 24 + 16
"""What an encrypted content is longer by: its nonce and its tag."""
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 24


class CacheKey:
    """What encrypts, and what texts are called by, so that nobody without it can tell whether a text is there.

    Args:
        secret: 32 random bytes. Raises ``MissingExtraError`` where PyNaCl is not installed.

    Attributes:
        name: tells keys apart, and says nothing of them.
    """

    def __init__(self, secret: bytes) -> None:
        try:
            import nacl.bindings
        except ImportError as error:
            raise missing_extra(error, "encryption") from None
        self._sodium = nacl.bindings
        self._encrypting, self._naming, name = (
            hashlib.blake2b(key=secret, person=purpose, digest_size=_KEY_BYTES).digest()
            for purpose in (b"dlora encrypt", b"dlora text", b"dlora key name")
        )
        self.name = name[:8].hex()

    @classmethod
    def load(cls, path: Path, warn: Callable[[str], None]) -> CacheKey:
        """From a file with 64 hexadecimal digits. Raises ``UsageError`` for another."""
        try:
            secret = bytes.fromhex(read_secret(OPTION, path, warn))
        except ValueError:
            secret = b""
        if len(secret) != _KEY_BYTES:
            raise UsageError(f"{OPTION} {path} does not hold 64 hexadecimal digits; make one: openssl rand -hex 32")
        return cls(secret)

    def digest(self, content: bytes) -> bytes:
        """32 bytes that stand for a text."""
        return hashlib.blake2b(content, key=self._naming, digest_size=32).digest()

    def seal(self, content: bytes, about: bytes) -> bytes:
        """``content`` encrypted, bound to what it is ``about``; ``SEALED_BYTES`` longer."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        encrypted: bytes = self._sodium.crypto_aead_xchacha20poly1305_ietf_encrypt(
            content, about, nonce, self._encrypting
        )
        return nonce + encrypted

    def open(self, sealed: bytes, about: bytes) -> bytes | None:
        """What was encrypted; None where it was changed, or is about something else."""
        from nacl.exceptions import CryptoError

        nonce, encrypted = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            content: bytes = self._sodium.crypto_aead_xchacha20poly1305_ietf_decrypt(
                encrypted, about, nonce, self._encrypting
            )
        except CryptoError:
            return None
        return content
