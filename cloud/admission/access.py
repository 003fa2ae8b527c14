"""Who may come in: a token, a client certificate or, on loopback, an address; and what strangers are told.

No sockets and no time but the injected clock. Where the tokens' file is locked it blocks: do not
call it on an event loop. ``Access.admit`` is for one thread at a time.
"""

from __future__ import annotations

import contextlib
import http
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from dlora.protocol.connections import source_of
from dlora.protocol.errors import RefusedError, StorageError
from dlora.protocol.messages import Error, ErrorCode

from .ledger import Ledger, MemoryLedger
from .tokens import BearerTokenStore
from .trusted_proxies import Origin

logger = logging.getLogger("dlora.cloud")

FAILURES_PER_WINDOW: Final = 10
STORAGE_RETRY_S: Final = 30.0
_TOKEN_IN_QUERY: Final = (
    "the URL has a query, and what stands in a URL gets into logs; a token belongs into the Authorization header, and "
    "one that was sent like this should be revoked"
)


@dataclass(frozen=True)
class Caller:
    """Who is at the other end.

    Attributes:
        name: for quotas and logs: the token's device, the certificate's common name, or the address.
        source: what the name was taken from.
        token_id: of the token, where there was one.
    """

    name: str
    source: Literal["token", "certificate", "address"]
    token_id: str | None = None


class AccessDeniedError(RefusedError):
    """A stranger, or one whose token was revoked or has expired.

    Attributes:
        status: of the HTTP answer: 401, 429, or 503 where the tokens cannot be read, or the server stops.
        should_log: whether it deserves a line of its own; False for a stranger who fails again and again.
    """

    def __init__(
        self, text: str, code: str, *, status: int, retry_after_s: float | None = None, should_log: bool = True
    ) -> None:
        super().__init__(text, code, retryable=retry_after_s is not None, retry_after_s=retry_after_s)
        self.status = http.HTTPStatus(status)
        self.should_log = should_log

    def headers(self) -> dict[str, str]:
        """The headers of the HTTP answer (RFC 6750, section 3), beside length and connection."""
        headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
        if self.status == http.HTTPStatus.UNAUTHORIZED:
            # Who brought no token is told no error: RFC 6750, section 3.1.
            error = "" if self.code == ErrorCode.TOKEN_MISSING else ', error="invalid_token"'
            headers["WWW-Authenticate"] = f'Bearer realm="dlora"{error}'
        if self.retry_after_s is not None:
            headers["Retry-After"] = f"{self.retry_after_s:.0f}"
        return headers

    def body(self) -> bytes:
        """The body of the HTTP answer: the wire's ``error`` message, as one line of JSON."""
        message = Error(code=self.code, message=str(self), retryable=self.retryable, retry_after_s=self.retry_after_s)
        return msgspec.json.encode(message) + b"\n"


class Access:
    """Decides who may come in.

    Failures are counted for each address, so that strangers fill neither the log nor the CPU. The count never
    keeps out a valid token: 256 random bits are not guessed, and a stranger behind the same address must not be
    able to lock out a device.

    Args:
        tokens: None where there are none to check.
        required: whether a device must bring a token or a client certificate.
        ledger: counts failures and knows what was revoked for several servers; by default one of its own.
    """

    def __init__(self, tokens: BearerTokenStore | None, *, required: bool, ledger: Ledger | None = None) -> None:
        self._tokens = tokens
        self._required = required
        self._ledger = ledger or MemoryLedger()

    def admit(
        self,
        authorization: str | None,
        origin: Origin,
        *,
        has_query: bool = False,
    ) -> Caller:
        """Who is calling.

        Args:
            authorization: the header's value, where there is one.
            has_query: whether the URL has one: that is refused, for it can only be a token.

        A token is checked wherever there is one; otherwise a certificate counts. Raises ``AccessDeniedError``.
        """
        try:
            if has_query:
                raise RefusedError(_TOKEN_IN_QUERY, ErrorCode.TOKEN_WRONG)
            return self._identify(authorization, origin)
        except AccessDeniedError:
            raise
        except RefusedError as error:
            failures, retry_after_s = self._ledger.count_failure(origin.address)
            if failures <= FAILURES_PER_WINDOW:
                raise AccessDeniedError(str(error), error.code, status=401) from None
            text = f"too many failures from this address, the last one: {error}"
            raise AccessDeniedError(
                text,
                ErrorCode.TOO_MANY_FAILURES,
                status=429,
                retry_after_s=max(1.0, retry_after_s),  # never 0: "at once" is no answer to who fails too often
                should_log=failures == FAILURES_PER_WINDOW + 1,
            ) from None

    def recheck(self, callers: Collection[Caller]) -> dict[Caller, AccessDeniedError]:
        """The callers whose token has expired or was revoked, and what they are told. From any thread.

        One look at the tokens for all of them. Raises ``AccessDeniedError`` (503) where they cannot be read just now.
        Where the ledger cannot be asked, what it would have said is found out the next time.
        """
        token_ids = {caller.token_id for caller in callers if caller.token_id is not None}
        if not token_ids or self._tokens is None:
            return {}
        try:
            ended = self._tokens.check(token_ids)
        except StorageError as error:
            raise _unreadable(error) from None
        with contextlib.suppress(StorageError):
            ended = {token_id: _revoked(token_id) for token_id in self._ledger.revoked(token_ids)} | ended
        return {
            caller: AccessDeniedError(str(ended[caller.token_id]), ended[caller.token_id].code, status=401)
            for caller in callers
            if caller.token_id in ended
        }

    def _identify(self, authorization: str | None, origin: Origin) -> Caller:
        if authorization is not None and self._tokens is not None:
            scheme, _, token = authorization.partition(" ")
            try:
                record = self._tokens.verify(token.strip() if scheme.lower() == "bearer" else "")
                is_revoked = bool(self._ledger.revoked([record.id]))
            except StorageError as error:
                raise _unreadable(error) from None
            if is_revoked:
                raise _revoked(record.id)
            return Caller(record.device, "token", record.id)
        if origin.certificate_name:
            return Caller(origin.certificate_name, "certificate")
        if self._required:
            text = (
                "no token and no client certificate; ask the server's operator, then use --token-file or --client-cert"
            )
            raise RefusedError(text, ErrorCode.TOKEN_MISSING)
        return Caller(source_of(origin.address), "address")


def _revoked(token_id: str) -> RefusedError:
    text = f"the token {token_id} is revoked; ask the server's operator for a new one"
    return RefusedError(text, ErrorCode.TOKEN_REVOKED)


def _unreadable(error: StorageError) -> AccessDeniedError:
    """No tokens, no way in. The device only learns that it may come again; the log has the path."""
    logger.error("%s", error)
    text = "the server cannot read its tokens; its log has more"
    return AccessDeniedError(text, ErrorCode.INTERNAL, status=503, retry_after_s=STORAGE_RETRY_S)
