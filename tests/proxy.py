"""A TCP proxy that keeps every byte of a websocket conversation, and a reader of what it kept."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np

BINARY, CLOSE = 2, 8
_HEADERS_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Frame:
    """One websocket frame: what it says, and how many bytes it took with its own header."""

    opcode: int
    payload: bytes
    raw_bytes: int


@dataclass
class Recording:
    """What went from the device to the server (up) and back (down), raw."""

    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)


@dataclass
class Proxy:
    """Listens at ``url``; one recording a connection, in the order they came."""

    url: str
    recordings: list[Recording] = field(default_factory=list)


@contextmanager
def recording_proxy(server_url: str, *, delay_s: float = 0.0) -> Iterator[Proxy]:
    """Stand between devices and a server until the context ends. Each piece waits for ``delay_s``."""
    host, port = server_url.removeprefix("ws://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = Proxy(f"ws://127.0.0.1:{listener.getsockname()[1]}")
    threads: list[threading.Thread] = []

    def accept() -> None:
        with suppress(OSError):
            while True:
                device, _ = listener.accept()
                server = socket.create_connection((host, int(port)))
                recording = Recording()
                proxy.recordings.append(recording)
                for source, sink, kept in ((device, server, recording.up), (server, device, recording.down)):
                    threads.append(threading.Thread(target=_pump, args=(source, sink, kept, delay_s), daemon=True))
                    threads[-1].start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield proxy
    finally:
        # A blocked accept() does not notice close() on Linux.
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (accepting, *threads):
            thread.join(5)


def _pump(source: socket.socket, sink: socket.socket, kept: bytearray, delay_s: float) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            kept += data
            time.sleep(delay_s)
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def read_frames(raw: bytes | bytearray) -> list[Frame]:
    """The frames of one direction, unmasked; its HTTP handshake is passed over."""
    offset = raw.index(_HEADERS_END) + len(_HEADERS_END)
    frames = []
    while offset < len(raw):
        start = offset
        opcode, masked, length = raw[offset] & 15, raw[offset + 1] >> 7, raw[offset + 1] & 127
        assert raw[offset] & 0xF0 == 0x80, "whole, uncompressed frames"
        offset += 2
        if length > 125:
            size = 2 if length == 126 else 8
            length = int.from_bytes(raw[offset : offset + size], "big")
            offset += size
        mask = bytes(raw[offset : offset + 4]) if masked else bytes(4)
        offset += 4 * masked
        payload = bytes(raw[offset : offset + length])
        offset += length
        assert len(payload) == length, "the last frame is cut off"
        if masked:
            repeated = np.frombuffer((mask * (length // 4 + 1))[:length], np.uint8)
            payload = (np.frombuffer(payload, np.uint8) ^ repeated).tobytes()
        frames.append(Frame(opcode, payload, offset - start))
    return frames


def payloads(raw: bytes | bytearray) -> list[bytes]:
    """The messages of one direction."""
    return [frame.payload for frame in read_frames(raw) if frame.opcode == BINARY]
