"""What the device shows the server, whom it trusts, and what it never sends in the clear."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self
from urllib.parse import SplitResult, urlsplit

import msgspec

from dlora.edge.files import read_secret
from dlora.edge.settings import Server
from dlora.protocol.connections import is_loopback
from dlora.protocol.errors import ConnectionFailedError, UsageError
from dlora.protocol.files import check_readable
from dlora.protocol.messages import Error

from .tls_socket import TakingTurns

TOKEN_VARIABLE: Final = "DLORA_TOKEN"
# RFC 6750, section 2.1. Nothing else can stand in the header, line breaks least of all.
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]{1,1024}=*")
_TOKEN_IN_URL: Final = re.compile(r"dlora_[0-9a-f]{8}_")


@dataclass(frozen=True)
class Credentials:
    """A device's credentials. Without any, it can use a server on loopback, or one that asks for none.

    Attributes:
        token: the bearer token; it is never shown, and never sent over plain ``ws://`` but to loopback.
        ca: PEM; where given, only servers that it signed are trusted, else those that the system trusts.
        client_cert: PEM; client_key: PEM, None where it stands in ``client_cert``.
        insecure: send the token over plain ``ws://`` all the same. Certificates are checked in any case.
    """

    token: str | None = field(default=None, repr=False)
    ca: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    insecure: bool = False

    @classmethod
    def load(
        cls,
        token_file: Path | None = None,
        *,
        ca: Path | None = None,
        client_cert: Path | None = None,
        client_key: Path | None = None,
        insecure: bool = False,
        environment: Mapping[str, str] = os.environ,
        warn: Callable[[str], None] | None = None,
    ) -> Self:
        """Credentials with the token of ``token_file``, else of the variable ``DLORA_TOKEN``, else without one.

        Args:
            warn: called with one line where others can read the file.

        Raises ``UsageError``; its text never holds the token.
        """
        if client_key is not None and client_cert is None:
            raise UsageError("--client-key needs --client-cert")
        token, source = environment.get(TOKEN_VARIABLE, "").strip() or None, TOKEN_VARIABLE
        if token_file is not None:
            token, source = read_secret("--token-file", token_file, warn), f"--token-file {token_file}"
        if token is not None and _TOKEN.fullmatch(token) is None:
            raise UsageError(f"{source} holds no token; it is one line, dlora_…, from: dlora-cloud token create")
        return cls(token, ca, client_cert, client_key, insecure)

    @classmethod
    def of(cls, server: Server, warn: Callable[[str], None] | None = None) -> Self:
        """What settings and ``DLORA_TOKEN`` say. Raises ``UsageError``."""
        names = ("token_file", "ca", "client_cert", "client_key", "insecure")
        return cls.load(**{name: getattr(server, name) for name in names}, warn=warn)

    def headers(self, url: str) -> dict[str, str]:
        """The HTTP headers of the handshake.

        Raises ``UsageError`` where ``url`` holds credentials, or the token could be read on the way.
        """
        parts = split_url(url)
        if self.token is None:
            return {}
        if parts.scheme != "wss" and not self.insecure and not is_loopback(parts.hostname or ""):
            raise UsageError(f"the token could be read on the way to {url}; write wss://, or add --insecure")
        return {"Authorization": f"Bearer {self.token}"}

    def ssl_context(self, url: str) -> ssl.SSLContext | None:
        """TLS 1.2 or newer for ``wss://``; None for ``ws://``.

        Raises ``UsageError`` where a file is missing or damaged, or ``url`` has no use for it.
        """
        if split_url(url).scheme != "wss":
            if self.ca or self.client_cert:
                raise UsageError(f"--ca and --client-cert are for wss://, and --server is {url}")
            return None
        for option, path in (("--ca", self.ca), ("--client-cert", self.client_cert), ("--client-key", self.client_key)):
            check_readable(option, path)
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except ssl.SSLError:
            raise UsageError(f"--ca {self.ca} is no certificate in PEM form") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = TakingTurns
        if self.client_cert is not None:
            self._load_client_certificate(context, self.client_cert)
        return context

    def _load_client_certificate(self, context: ssl.SSLContext, cert: Path) -> None:
        key = self.client_key or cert

        def refuse_password() -> str:  # without it OpenSSL would ask for one on the terminal
            raise UsageError(f"--client-key {key} is encrypted; decrypt it: openssl pkey -in {key} -out KEY")

        try:
            context.load_cert_chain(cert, key, password=refuse_password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise UsageError(f"--client-key {key} is not the key of --client-cert {cert}") from None
            raise UsageError(f"--client-cert {cert} or --client-key {key} is not in PEM form") from None


def split_url(url: str) -> SplitResult:
    """The parts of ``url``. Raises ``UsageError`` where it holds a secret or cannot be split, and never repeats it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise UsageError("--server is no websocket address; write wss://HOST:PORT or ws://HOST:PORT") from None
    if "@" in parts.netloc or _TOKEN_IN_URL.search(url):
        raise UsageError(
            f"--server has a user, password or token in it; leave it out and use --token-file or {TOKEN_VARIABLE}"
        )
    if "?" in url or "#" in url:
        raise UsageError(
            "--server has a query (?…) or a fragment (#…), and what stands in a URL gets into logs; leave it out, and "
            f"use --token-file or {TOKEN_VARIABLE} for a token"
        )
    return parts


def refusal_in(body: bytes | bytearray | None) -> Error | None:
    """The ``error`` message in the body of an HTTP answer (401, 429, 503); None where it is not of a dlora server."""
    try:
        return msgspec.json.decode(body or b"", type=Error)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def tls_failure(error: ssl.SSLError, url: str) -> ConnectionFailedError:
    """The one line for a failed TLS handshake."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConnectionFailedError(
            f"the certificate of {url} is not to be trusted: {error.verify_message.rstrip('.')}; check the address, "
            "the device's clock and --ca"
        )
    # A server that does not trust our certificate often only hangs up, as does one that expects no TLS.
    return ConnectionFailedError(
        f"{url} broke off the TLS handshake ({error.reason}); is it ws://, or does it not trust --client-cert?"
    )
