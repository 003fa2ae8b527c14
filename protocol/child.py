"""A child process for what a stranger's file makes a library do: it may ask for any memory, never end, or crash.

A chat template is a program, a tokenizer nearly is one, and neither Jinja nor the tokenizers library has a limit. So
they run in a forked child. It says where it is in a note that both processes see; whatever becomes of it is then one
line that names that place. Memory is limited, time is not: a large data set takes long. *Standing still* is limited.
For the device's data and prompts, and for the audit's texts. docs/log/decisions/0030-strangers-files-in-a-child.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import mmap
import os
import resource
import select
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from . import errors, interrupts
from .errors import DloraError
from .text import first_line, one_line

Buffer = bytes | bytearray | memoryview
Work = Callable[[bytes], Sequence[Buffer]]

NO_PROGRESS_S: Final = 120
MIN_SPARE_BYTES: Final = 1 << 30
_TICK_S: Final = 1.0
_NOTE: Final = struct.Struct("<QHH")  # how often it was written; length of the error's name, and of the place
_NOTE_BYTES: Final = 16 << 10
_LENGTH: Final = struct.Struct("<Q")
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_OUT_OF_MEMORY, _BUG = "out of memory", "bug"


class Note:
    """Where the child is, in memory that parent and child share; ``advice`` says what to do where that place needs too
    much memory, or never ends."""

    def __init__(self, advice: str) -> None:
        self.advice = advice
        self._memory = mmap.mmap(-1, _NOTE_BYTES)
        self._count = 0

    def set_place(self, place: str, error_type: type[DloraError]) -> None:
        """Say what is read now, as the subject of a sentence, and what error it is if that never ends."""
        name, text = error_type.__name__.encode(), place.encode(errors="replace")[: _NOTE_BYTES - 256]
        self._count += 1
        self._memory[_NOTE.size : _NOTE.size + len(name) + len(text)] = name + text
        self._memory[: _NOTE.size] = _NOTE.pack(self._count, len(name), len(text))

    @property
    def count(self) -> int:
        """How often something was said: as long as it grows, there is progress."""
        return int(_NOTE.unpack(self._memory[: _NOTE.size])[0])

    @property
    def place(self) -> str:
        return self._read()[1]

    def error(self, what_happened: str) -> DloraError:
        """The place, and what happened there."""
        name, place = self._read()
        return _error(_ERRORS.get(name, DloraError), f"{place} {what_happened}", {})

    def _read(self) -> tuple[str, str]:
        _, named, length = _NOTE.unpack(self._memory[: _NOTE.size])
        text = self._memory[_NOTE.size : _NOTE.size + named + length]
        return text[:named].decode(errors="replace"), text[named:].decode(errors="replace")  # written just now, perhaps


class Child:
    """A forked process that answers calls until the context ends. Enter it before there are threads or an engine. The
    signals that end this process end the child with it.

    Args:
        work: runs in the child, once a call; gets the call's bytes and returns buffers. Whatever it holds is the
            child's own.
        on_tick: is called with the note's place, once a second while a call goes on.

    Attributes:
        is_lost: whether it has died or stands still, so that it answers no more.
    """

    def __init__(self, work: Work, note: Note, on_tick: Callable[[str], None] = lambda _: None) -> None:
        self._work = work
        self._note = note
        self._on_tick = on_tick
        self._pid = 0
        self._no_progress_s: float = NO_PROGRESS_S
        self.is_lost = False

    def __enter__(self) -> Child:
        self._spare_bytes, self._parent = spare_bytes(), os.getpid()
        child_input, self._output = os.pipe()
        self._input, child_output = os.pipe()
        # A signal between fork and what follows would unwind the parent's code in the child, or lose the child.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.SIGNALS)
        try:
            self._pid = os.fork()
            if self._pid == 0:
                self._serve(child_input, child_output)
        except OSError as error:
            self._close()
            raise DloraError(f"no process can be started ({error.strerror}); close other programs") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            os.close(child_input)
            os.close(child_output)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._pid:
            self._kill()

    def _close(self) -> None:
        os.close(self._input)
        os.close(self._output)

    def call(self, request: bytes = b"") -> list[bytearray]:
        """What ``work`` returns for ``request``.

        Raises whatever ``DloraError`` it raises, and the note's where it stands still, needs too much memory or dies.
        """
        if not self._pid:
            raise self._note.error("ended the process that reads it before")
        try:
            # So that an interrupt leaves by way of __exit__, which ends the child: it may be in a loop.
            with interrupts.raise_on_signal():
                rest = memoryview(_LENGTH.pack(len(request)) + request)
                while rest:
                    rest = rest[os.write(self._output, rest) :]
                reply = msgspec.msgpack.decode(self._receive(), type=_Reply)
                parts = [self._receive() for _ in range(reply.parts)]
        except (EOFError, ConnectionError):
            self.is_lost = True
            raise self._note.error(self._exit_reason()) from None
        if reply.error == _OUT_OF_MEMORY:
            raise self._note.error(self._too_much_memory())
        if reply.error == _BUG:
            raise RuntimeError(f"in the child process:\n{reply.text}")
        if reply.error:
            raise _error(_ERRORS[reply.error], reply.text, reply.attributes)
        return parts

    def _receive(self) -> bytearray:
        return self._receive_exactly(_LENGTH.unpack(self._receive_exactly(_LENGTH.size))[0])

    def _receive_exactly(self, size: int) -> bytearray:
        content = bytearray(size)
        view, still, count = memoryview(content), 0, -1
        poll = select.poll()
        poll.register(self._input, select.POLLIN)
        while view:
            if poll.poll(_TICK_S * 1000):
                received = os.readv(self._input, [view])
                if not received:
                    raise EOFError
                view, still = view[received:], 0
                continue
            # Ticks are counted, not the clock: whoever stops both processes with Ctrl-Z may take their time.
            self._on_tick(self._note.place)
            still = still + 1 if self._note.count == count else 0
            count = self._note.count
            if still * _TICK_S >= self._no_progress_s:
                self.is_lost = True
                raise self._note.error(f"took longer than {self._no_progress_s:.0f} s; {self._note.advice}")
        return content

    def _exit_reason(self) -> str:
        status = self._kill()
        if not os.WIFSIGNALED(status):
            return f"ended the process that reads it (exit code {os.waitstatus_to_exitcode(status)})"
        number = os.WTERMSIG(status)
        if number in (signal.SIGABRT, signal.SIGKILL):  # Rust's allocator gives up; the system needs its memory back
            return self._too_much_memory()
        return f"crashed the library that reads it ({signal.Signals(number).name}); leave it out, or update dlora"

    def _too_much_memory(self) -> str:
        spare = f"the {self._spare_bytes >> 20} MiB of memory that this machine has to spare for it"
        return f"needs more than {spare}; close other programs, or {self._note.advice}"

    def _kill(self) -> int:
        """Kill and reap the child; its wait status."""
        pid, self._pid = self._pid, 0
        try:
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            return status
        except (ChildProcessError, ProcessLookupError):  # whoever started us ignores SIGCHLD, and the system reaps
            return signal.SIGKILL

    # -- in the child ------------------------------------------------------------------------------------

    def _serve(self, child_input: int, child_output: int) -> NoReturn:
        """Answer until the parent hangs up. Never returns: the parent's code above us is not ours to run."""
        try:
            self._close()
            _set_up_child(self._parent, self._spare_bytes)
            requests, replies = os.fdopen(child_input, "rb"), os.fdopen(child_output, "wb")
            while size := requests.read(_LENGTH.size):
                request = requests.read(_LENGTH.unpack(size)[0])
                reply, parts = self._answer(request)
                for part in (msgspec.msgpack.encode(reply), *parts):
                    replies.write(_LENGTH.pack(memoryview(part).nbytes))
                    replies.write(part)
                replies.flush()
        finally:
            os._exit(0)

    def _answer(self, request: bytes) -> tuple[_Reply, Sequence[Buffer]]:
        try:
            parts = self._work(request)
            return _Reply(parts=len(parts)), parts
        except DloraError as error:
            return _Reply(error=type(error).__name__, text=one_line(str(error)), attributes=vars(error)), ()
        except MemoryError:
            return _Reply(error=_OUT_OF_MEMORY), ()
        except BaseException:
            return _Reply(error=_BUG, text=traceback.format_exc()), ()


class ReplacedChild(Child):
    """A child in whose place another comes where something ends it, or makes it stand still.

    It forks only once, before there are threads: a process that never touches what is a stranger's, and that has the
    child which does. Arguments as of ``Child``.
    """

    def __init__(self, work: Work, note: Note, on_tick: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(_replacing(work, note), note, on_tick)
        self._no_progress_s = 2 * NO_PROGRESS_S  # the process between gives up before, and tells what it was


def _replacing(work: Work, note: Note) -> Work:
    """``work`` in a child of the process that runs this, a new one each time the last has ended."""
    children: list[Child] = []

    def answer(request: bytes) -> Sequence[Buffer]:
        if not children:
            child = Child(work, note)
            children.append(child.__enter__())
        child = children[0]
        try:
            return child.call(request)
        except DloraError:
            if child.is_lost:
                children.clear()
                child.__exit__()
            raise

    return answer


class _Reply(msgspec.Struct, kw_only=True):
    """How a call ended, ``error`` being a name of ``_ERRORS`` or one of our own; ``parts`` buffers follow."""

    parts: int = 0
    error: str = ""
    text: str = ""
    attributes: dict[str, Any] = {}


@contextlib.contextmanager
def library_errors(kind: type[DloraError], problem: str, advice: str) -> Iterator[None]:
    """Whatever a library in Rust raises as ``kind``, in one line: an ``Exception``, or where it panics not even that.

    But for ``MemoryError``, which children and commands tell of themselves.
    """
    try:
        yield
    except (DloraError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{problem} ({first_line(error)}); {advice}") from None


def spare_bytes() -> int:
    """What a child may take beside what is mapped already: half of the memory that is available, but 1 GiB at least.

    Half, because what it has read is there twice while it is handed over. 1 GiB, because a tokenizer of 256k words
    takes 200 MB, and a line up to 200 times its own size; where there is less, the system ends the child first.
    """
    import psutil  # where it is used: it is slow to load

    return max(MIN_SPARE_BYTES, int(psutil.virtual_memory().available) // 2)


def _set_up_child(parent: int, spare: int) -> None:
    """Limits, and nothing of the parent's that shows: no words on its terminal, none of its signals."""
    for number in interrupts.SIGNALS:  # may go to the whole group; the parent ends us
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.SIGNALS)
    null_device = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_device, 1)
    os.dup2(null_device, 2)  # Rust says why it gives up
    faulthandler.disable()
    _limit(resource.RLIMIT_CORE, 0)  # text of the user's lies in this memory
    if sys.platform == "linux":
        _limit(resource.RLIMIT_AS, int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE + spare)
        # Where memory does run out, or limits are ignored (qemu), let it be us whom the system ends.
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        end_with(parent)
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)  # systems that pipe cores to a program ignore the limit


def end_with(parent: int) -> None:
    """Be killed when the parent ends, the process of that id, whatever this one waits for then; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before we asked to be ended with it
            os._exit(1)


def _limit(which: int, most: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # not every system has every limit
        hard = resource.getrlimit(which)[1]
        resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _error(kind: type[DloraError], text: str, attributes: dict[str, Any]) -> DloraError:
    # Not by calling it: some take more than a text.
    error = kind.__new__(kind, text)
    error.args = (text,)
    vars(error).update(attributes)
    return error


_ERRORS: Final = {
    name: found for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, DloraError)
}
