"""A write that a server holds up ends some seconds after somebody asked to stop, and not before."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from dlora.edge.wire.write_watch import UNBLOCKED_BYTES, WriteWatch

LARGE = UNBLOCKED_BYTES + 1


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection, the first of which nothing more can be written to."""
    writer, reader = socket.socketpair()
    writer.setblocking(False)
    with writer, reader:
        with contextlib.suppress(BlockingIOError):
            while True:
                writer.send(bytes(1 << 16))
        writer.setblocking(True)
        yield writer, reader


def write(watch: WriteWatch, tcp: socket.socket) -> None:
    """Raises ``OSError`` where the connection is shut down meanwhile."""
    with watch.writing(tcp, LARGE):
        tcp.sendall(bytes(LARGE))


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "write-watch"]


def test_write_that_is_held_up_ends_when_somebody_asked_to_stop(ends: tuple[socket.socket, socket.socket]) -> None:
    stop, began = threading.Event(), time.monotonic()
    watch = WriteWatch(stop.is_set, 0.01, grace_s=0.05)
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(OSError):  # noqa: PT011  # broken pipe or reset
        write(watch, ends[0])
    assert time.monotonic() - began >= 0.2
    watch.close()


def test_writes_that_end_are_left_alone(ends: tuple[socket.socket, socket.socket]) -> None:
    """However many there are, and although somebody asked to stop: each has its own time."""
    writer, reader = ends
    watch = WriteWatch(lambda: True, 0.01, grace_s=5.0)

    def read() -> None:
        with contextlib.suppress(OSError):
            while reader.recv(1 << 20):
                pass

    threading.Thread(target=read, daemon=True).start()
    before = watchers()  # of tests before this one, which may end meanwhile
    for _ in range(50):
        write(watch, writer)
    (own,) = [thread for thread in watchers() if thread not in before]
    watch.close()
    own.join(60)
    assert not own.is_alive()


def test_small_writes_need_no_thread(ends: tuple[socket.socket, socket.socket]) -> None:
    before = watchers()
    with WriteWatch(lambda: True, 0.01, grace_s=0.0).writing(ends[0], UNBLOCKED_BYTES):
        pass
    assert not [thread for thread in watchers() if thread not in before]
