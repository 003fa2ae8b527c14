"""How a console command runs and ends: errors as one line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from . import interrupts
from .errors import DloraError, LocalProtocolError, MissingExtraError, StorageError, UsageError
from .interrupts import INTERRUPTED, INTERRUPTED_EXIT_CODE
from .text import one_line
from .usage_words import usage_words

_STORAGE_ERRNOS: Final = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EIO}
_LONGEST_LINE: Final = 2000


def run_command(command: Callable[[], None]) -> None:
    """Run a console command; turn a named error into one line on stderr and its exit code.

    ``OSError`` from a full, read-only or forbidden disk counts as ``StorageError``, ``MemoryError`` as any
    ``DloraError``. SIGTERM and SIGHUP count as Ctrl-C.
    Anything that we do not name is a bug and keeps its traceback; so does a ``LocalProtocolError``, which is one.
    """
    interrupts.exit_on_signal()
    try:
        command()
    except LocalProtocolError as error:
        traceback.print_exception(error)
        _fail(f"a bug in dlora: {error}; please report it, with the lines above", error.exit_code)
    except DloraError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, SystemExit) as ended:
        # typer turns Ctrl-C into this code without a word.
        if isinstance(ended, SystemExit) and ended.code != INTERRUPTED_EXIT_CODE:
            raise
        interrupts.ignore_signals()
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
        interrupts.ignore_signals()


def run_app(app: Callable[..., Any], name: str) -> None:
    """Run an app of typer's, and exit. Raises ``UsageError`` for a command line that is wrong, in our words."""
    try:
        code = app(prog_name=name, standalone_mode=False)
    except Exception as error:
        # By their attributes: which module they are of depends on typer's version.
        if type(error).__name__ == "Abort":
            raise SystemExit(1) from None
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # which has printed it
            if shown := error.format_message():
                print(shown, file=sys.stderr)
            raise SystemExit(UsageError.exit_code) from None
        raise UsageError(usage_words(error)) from None
    raise SystemExit(code or 0)


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


def _fail(text: str, exit_code: int) -> None:
    # A stranger's name may be a megabyte.
    line = one_line(text)
    said = f"error: {line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + ' …'}"
    try:
        print(said, file=sys.stderr, flush=True)
    except OSError:  # nobody reads it any more; the exit code stays
        interrupts.leave_closed_output()
    raise SystemExit(exit_code)
