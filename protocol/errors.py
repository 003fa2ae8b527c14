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
    │   ├── LocalProtocolError           … and the bug is ours
    │   └── RemoteProtocolError          … and the fault is the peer's (carries a wire code)
    │       └── DamagedFrameError        … or the network's
    ├── RefusedError                 8   the server said no, and why
    ├── StorageError                 9   the disk is full, read-only or gone
    ├── CheckpointError             10   no usable checkpoint, adapter or state file
    ├── ExportError                 11   the model is not supported, or a graph is not exact enough
    ├── MissingExtraError           12   an optional dependency is not installed
    ├── DivergedError               13   training has diverged: NaN or infinity
    └── StoppedError               130   Ctrl-C or SIGTERM, and everything was saved
    (Ctrl-C, SIGTERM)              130

A command prints ``error: <one line>`` on stderr and exits with the code. Codes never change meaning.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Final

from . import interrupts
from .interrupts import INTERRUPTED, INTERRUPTED_EXIT_CODE


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
    """The server's base model is not the one that the bundle was exported from."""

    exit_code = 5


class ConnectionFailedError(DloraError):
    """The server cannot be reached, or the connection was lost."""

    exit_code = 6


class ProtocolError(DloraError):
    """The conversation broke the rules of docs/protocol.md."""

    exit_code = 7


class LocalProtocolError(ProtocolError):
    """We were about to send what the rules forbid: a bug of ours."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what the rules or our limits forbid.

    Attributes:
        code: the wire code (``messages.ErrorCode``) that the answer carries.
        retryable: whether the same may succeed later.
        retry_after_s: when to come again, in seconds, where we know.
    """

    def __init__(
        self, text: str, code: str = "protocol", *, retryable: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(text)
        self.code = code
        self.retryable = retryable
        self.retry_after_s = retry_after_s


class DamagedFrameError(RemoteProtocolError):
    """A frame is not what its sender wrote; over another connection the same frame may arrive whole."""

    def __init__(self, text: str) -> None:
        super().__init__(text, "damaged", retryable=True)


class SessionLostError(ConnectionFailedError):
    """The server answers again but has forgotten the session: open another with the ticket, repeat the step."""


class RefusedError(DloraError):
    """The server refused, as it may.

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


class DivergedError(DloraError):
    """Training has diverged: there is NaN or infinity in what the device or the base model computed.

    The same run does so again, whatever it goes on from; a lower learning rate helps.
    """

    exit_code = 13


class StoppedError(DloraError):
    """The user asked to stop; everything was saved."""

    exit_code = INTERRUPTED_EXIT_CODE


_STORAGE_ERRNOS: Final = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EIO}


_LONGEST_LINE: Final = 2000


def run_command(command: Callable[[], None]) -> None:
    """Run a console command; turn a named error into one line on stderr and its exit code.

    ``OSError`` from a full, read-only or forbidden disk counts as ``StorageError``, ``MemoryError`` as any
    ``DloraError``. SIGTERM counts as Ctrl-C.
    Anything that we do not name is a bug and keeps its traceback.
    """
    interrupts.end_at_once()
    try:
        try:
            command()
        except SystemExit as ended:
            if ended.code == INTERRUPTED_EXIT_CODE:
                # typer turns Ctrl-C into this code without a word.
                raise KeyboardInterrupt from None
            raise
    except DloraError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        interrupts.ignore()
        _fail(INTERRUPTED, INTERRUPTED_EXIT_CODE)
    except MemoryError:
        _fail("there is not enough memory for this; close other programs, or choose smaller settings", 1)
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`): not an error, and nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        if error.errno not in _STORAGE_ERRNOS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"cannot write: {where}{error.strerror}; free space or choose another place", StorageError.exit_code)
    finally:
        interrupts.ignore()


@contextmanager
def extra_needed(extra: str) -> Iterator[None]:
    """Inside, a module that is not installed is a ``MissingExtraError``: commands load what they need late."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dlora"):
            raise
        raise missing_extra(error, extra) from None


def missing_extra(error: ImportError, extra: str) -> MissingExtraError:
    """The error for a command whose extra is not installed, or cannot be on this machine."""
    if sys.maxsize < 2**32:
        return MissingExtraError(
            f"the module {error.name!r} is not installed, and this is a system of 32 bits: numpy and onnxruntime have "
            "no builds for it; use a 64-bit system, where getconf LONG_BIT says 64"
        )
    return MissingExtraError(
        f"the module {error.name!r} is not installed; this command needs the extra {extra!r}: "
        f"pip install 'dlora[{extra}]'"
    )


def first_line(error: BaseException, letters: int = 200) -> str:
    """What an exception of a library says first, as one line; where it says nothing, what it is."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[0])[:letters]


def one_line(text: str) -> str:
    """``text`` as one line of printable letters: some of it may be a peer's words, and must not steer a terminal."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def _fail(text: str, exit_code: int) -> None:
    # A stranger's name may be a megabyte.
    line = one_line(text)
    print(f"error: {line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + ' …'}", file=sys.stderr)
    raise SystemExit(exit_code)
