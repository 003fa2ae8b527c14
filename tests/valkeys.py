"""A real Valkey, on a socket in a directory; killed and started again where a test wants that."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools import find_tool
from waiting import eventually


class Valkey:
    """A server whose data lie in ``directory``: every write is on the disk before it is answered."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = directory / "valkey.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        with (self._directory / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(
                [find_tool("valkey-server"), "--port", "0", "--unixsocket", self._socket, "--dir", self._directory,
                 "--save", "", "--appendonly", "yes", "--appendfsync", "always"],
                stdout=log, stderr=log,
            )  # fmt: skip
        eventually(self._socket.exists)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@contextmanager
def valkey_server(directory: Path) -> Iterator[Valkey]:
    """A Valkey until the context ends. ``directory`` must have a short name: a socket's has 107 characters at most."""
    assert len(os.fsencode(directory)) < 90
    server = Valkey(directory)
    server.start()
    try:
        yield server
    finally:
        server.kill()
