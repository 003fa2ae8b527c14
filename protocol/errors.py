"""Every error that dlora raises on purpose, and the exit code of each; and the codes that an error has on the wire.

Each says below what it means and whether the same may go well later; docs/reference/exit-codes.md is made of that.
A command prints ``error: <one line>`` on stderr and exits with the code. Codes never change meaning.

Whose fault an error is decides what becomes of it, on the device and in the cloud::

    LocalProtocolError    its traceback, then ``error: a bug in dlora: …``   logged with its traceback, as any bug;
                                                                             the device is told ``internal``
    RemoteProtocolError   one line                                           one line in the log; told with its code
    RefusedError          one line: what the server said                     one line in the log; told with its code
    NonFiniteError        one line                                           one line in the log; ``non_finite``
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from .interrupts import INTERRUPTED_EXIT_CODE


class ErrorCode(StrEnum):
    """Why the server refused or closed; stable names. ``retryable`` of ``Error`` says whether to come again."""

    PROTOCOL = "protocol"
    VERSION = "version"
    BASE_MODEL_MISMATCH = "base_model_mismatch"
    UNKNOWN_TARGET = "unknown_target"
    LIMIT = "limit"
    NON_FINITE = "non_finite"
    TICKET = "ticket"
    DAMAGED = "damaged"
    DEADLINE = "deadline"
    FLOOD = "flood"
    TOKEN_MISSING = "token_missing"
    TOKEN_WRONG = "token_wrong"
    TOKEN_EXPIRED = "token_expired"
    TOKEN_REVOKED = "token_revoked"
    TOO_MANY_FAILURES = "too_many_failures"
    QUOTA_SESSIONS = "quota_sessions"
    QUOTA_TOKENS = "quota_tokens"
    QUOTA_LIVE_BYTES = "quota_live_bytes"
    QUOTA_COMPUTE = "quota_compute"
    BUSY = "busy"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL = "internal"


class ViolationError(Exception):
    """A message breaks a rule. Whoever sent or received it makes a ``LocalProtocolError`` or ``RemoteProtocolError`` of
    it, so it never leaves a session."""

    def __init__(self, text: str, code: ErrorCode = ErrorCode.PROTOCOL) -> None:
        super().__init__(text)
        self.code = code


class DloraError(Exception):
    """Something else that we name; ``selftest`` or ``doctor`` found a problem, ``plan`` nothing that fits.

    Base of all errors that dlora raises on purpose; its text is one line that says what to do. ``again``: whether the
    same command may go well later, in Markdown.
    """

    exit_code: ClassVar[int] = 1
    again: ClassVar[str] = "see its line"


class UsageError(DloraError):
    """The command line, or what stands in a file of settings, is wrong."""

    exit_code = 2
    again = "no"


class DataError(DloraError):
    """The training data cannot be used; file and line are named."""

    exit_code = 3
    again = "no"


class BundleError(DloraError):
    """The bundle is missing, damaged or too new."""

    exit_code = 4
    again = "no: export again"


class ModelMismatchError(DloraError):
    """The server's base model, or the adapter's, is not the bundle's."""

    exit_code = 5
    again = "no: serve the bundle's model, or take an adapter of it"


class ConnectionFailedError(DloraError):
    """The server cannot be reached, was lost and ``--max-retry-s`` is over, or cannot listen."""

    exit_code = 6
    again = "yes, with `dlora-edge resume`"


class ProtocolError(DloraError):
    """The conversation broke its rules, or there is no common version."""

    exit_code = 7
    again = 'no: update the older side; where it says "a bug in dlora", report it'


class LocalProtocolError(ProtocolError):
    """We were about to send what the rules forbid: a bug of ours, never told as anything else."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what the rules forbid; the answer carries its ``code``, an ``ErrorCode``. A broken rule stays
    broken: the same does not succeed later."""

    retryable: ClassVar[bool] = False

    def __init__(self, text: str, code: str = "protocol") -> None:
        super().__init__(text)
        self.code = code


class DamagedFrameError(RemoteProtocolError):
    """A frame is not what its sender wrote; over another connection the same frame may arrive whole."""

    retryable = True

    def __init__(self, text: str) -> None:
        super().__init__(text, "damaged")


class SessionLostError(ConnectionFailedError):
    """The server answers again but has forgotten the session: open another with the ticket, repeat the step."""


class RefusedError(DloraError):
    """The server refused, and why.

    Nobody broke a rule: it is full, stops, has its limits, does not know who calls, or has a bug itself. ``code`` is an
    ``ErrorCode``; ``retryable``: whether the same request may succeed later; ``retry_after_s``: after how many seconds,
    where the server said so.
    """

    exit_code = 8
    again = "if the server is full or shutting down: yes, with `dlora-edge resume`; no for tokens, tickets and limits"

    def __init__(self, text: str, code: str, *, retryable: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.retryable = retryable
        self.retry_after_s = retry_after_s


class StorageError(DloraError):
    """The disk is full, read-only or gone; what was saved is intact."""

    exit_code = 9
    again = "after you made room, with `dlora-edge resume`"


class CheckpointError(DloraError):
    """There is no usable checkpoint or adapter."""

    exit_code = 10
    again = "no"


class ExportError(DloraError):
    """The model is not supported, or a graph is not exact enough."""

    exit_code = 11
    again = "no"


class MissingExtraError(DloraError):
    """An optional dependency is not installed, or this machine cannot have it."""

    exit_code = 12
    again = "after installing it"


class NonFiniteError(DloraError):
    """Training has diverged: NaN or infinity; start anew with a lower ``--lr``.

    The same run does so again, whatever it goes on from; a lower learning rate helps.
    """

    exit_code = 13
    again = "no: it would diverge again"


class WorseError(DloraError):
    """Training has made the model worse, and ``--on-worse stop`` ended it; what was best is saved."""

    exit_code = 14
    again = "no: start anew with a lower `--lr`"


class StoppedError(DloraError):
    """Ctrl-C, SIGTERM or a closed terminal; ``train`` finishes and saves its step first."""

    exit_code = INTERRUPTED_EXIT_CODE
    again = "yes, with `dlora-edge resume`"
