"""Every error that dlora raises on purpose, and the exit code of each.

::

    DloraError                       1   anything else that we name
    ├── UsageError                   2   the command line is wrong (typer's own code)
    ├── DataError                    3   the training data cannot be used
    ├── BundleError                  4   the bundle is missing, damaged or too new
    ├── ModelMismatchError           5   the server's base model is not the bundle's
    ├── ConnectionFailedError        6   the server cannot be reached, or was lost
    │   └── SessionLostError             … and is back without the session (never reaches the user)
    ├── ProtocolError                7   the conversation broke its rules
    │   ├── LocalProtocolError           … and the bug is ours: it keeps its traceback
    │   └── RemoteProtocolError          … and the fault is the peer's (carries a wire code)
    │       └── DamagedFrameError        … or the network's
    ├── RefusedError                 8   the server says no, as it may, and why (carries a wire code)
    ├── StorageError                 9   the disk is full, read-only or gone
    ├── CheckpointError             10   no usable checkpoint, adapter or state file
    ├── ExportError                 11   the model is not supported, or a graph is not exact enough
    ├── MissingExtraError           12   an optional dependency is not installed
    ├── NonFiniteError              13   training has diverged: NaN or infinity
    ├── WorseError                  14   training made the model worse, and --on-worse stop ended it
    └── StoppedError               130   Ctrl-C, SIGTERM or SIGHUP, and everything was saved
    (Ctrl-C, SIGTERM, SIGHUP)      130

A command prints ``error: <one line>`` on stderr and exits with the code. Codes never change meaning.

Whose fault an error is decides what becomes of it, on the device and in the cloud::

    LocalProtocolError    its traceback, then ``error: a bug in dlora: …``   logged with its traceback, as any bug;
                                                                             the device is told ``internal``
    RemoteProtocolError   one line                                           one line in the log; told with its code
    RefusedError          one line: what the server said                     one line in the log; told with its code
    NonFiniteError        one line                                           one line in the log; ``non_finite``
"""

from __future__ import annotations

from typing import ClassVar

from .interrupts import INTERRUPTED_EXIT_CODE


class DloraError(Exception):
    """Base of all errors that dlora raises on purpose; its text is one line that says what to do."""

    exit_code: ClassVar[int] = 1


class UsageError(DloraError):
    """The command line or configuration contradicts itself."""

    exit_code = 2


class DataError(DloraError):
    """The data set is missing, empty or malformed; the text names file and line."""

    exit_code = 3


class BundleError(DloraError):
    """The bundle is missing, damaged (a digest differs) or of a newer format."""

    exit_code = 4


class ModelMismatchError(DloraError):
    """The server's base model, or that of an adapter, is not the one that the bundle was exported from."""

    exit_code = 5


class ConnectionFailedError(DloraError):
    """The server cannot be reached, or the connection was lost."""

    exit_code = 6


class ProtocolError(DloraError):
    """The conversation broke the rules of docs/protocol.md."""

    exit_code = 7


class LocalProtocolError(ProtocolError):
    """We were about to send what the rules forbid: a bug of ours, never told as anything else."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what the rules forbid.

    Attributes:
        code: the wire code (``messages.ErrorCode``) that the answer carries.
        retryable: whether the same may succeed later; a broken rule stays broken.
    """

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
    """The server says no, as it may: raised where it does so, and on the device that hears of it.

    Nobody broke a rule: it is full, stops, has its limits, does not know who calls, or has a bug itself.

    Attributes:
        code: the wire code (``messages.ErrorCode``).
        retryable: whether the same request may succeed later.
        retry_after_s: when to come again, in seconds, where the server said so.
    """

    exit_code = 8

    def __init__(self, text: str, code: str, *, retryable: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.retryable = retryable
        self.retry_after_s = retry_after_s


class StorageError(DloraError):
    """Writing failed: the disk is full, read-only or gone. What was saved before is intact."""

    exit_code = 9


class CheckpointError(DloraError):
    """A checkpoint or adapter cannot be used."""

    exit_code = 10


class ExportError(DloraError):
    """The model is not supported, or an exported graph is not exact enough."""

    exit_code = 11


class MissingExtraError(DloraError):
    """An optional dependency is not installed, or has no build for this machine."""

    exit_code = 12


class NonFiniteError(DloraError):
    """There is NaN or infinity in what the device or the base model computed: training has diverged.

    The same run does so again, whatever it goes on from; a lower learning rate helps.
    """

    exit_code = 13


class WorseError(DloraError):
    """Training has made the model worse than it was, and was to end then; what was best was saved."""

    exit_code = 14


class StoppedError(DloraError):
    """The user asked to stop; everything was saved."""

    exit_code = INTERRUPTED_EXIT_CODE
