"""HAProxy in front of servers, with the configuration that is shipped."""

from __future__ import annotations

import csv
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools import find_tool
from waiting import eventually

CONFIGURATION = Path(__file__).parents[1] / "packaging" / "haproxy.cfg"


@dataclass(frozen=True)
class Haproxy:
    """A running HAProxy: where devices come to, and its own commands."""

    port: int
    socket_path: Path

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def command(self, text: str) -> str:
        """What HAProxy says to one of its commands."""
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(self.socket_path))
            asking.sendall(f"{text}\n".encode())
            return b"".join(iter(lambda: asking.recv(1 << 16), b"")).decode()

    def cut(self, replica: int) -> None:
        """End every connection to a replica, the first is 1."""
        self.command(f"shutdown sessions server replicas/replica-{replica}")

    def states(self) -> list[str]:
        """``UP`` or ``DOWN`` of each replica, as the checks found it last."""
        return self._of_replicas("status")

    def connections(self) -> list[int]:
        """How many there are now to each replica."""
        return [int(count) for count in self._of_replicas("scur")]

    def _of_replicas(self, column: str) -> list[str]:
        lines = csv.DictReader(self.command("show stat").removeprefix("# ").splitlines())
        return [line[column] for line in lines if line["pxname"] == "replicas" and line["svname"] != "BACKEND"]


def address_of(url: str) -> str:
    return url.partition("://")[2]


@contextmanager
def haproxy(replica_urls: Sequence[str], directory: Path, **settings: str) -> Iterator[Haproxy]:
    """HAProxy in front of two to four servers, until the context ends. ``settings``: variables of its configuration."""
    admin, program = directory / "haproxy.sock", find_tool("haproxy")
    replicas = {f"DLORA_REPLICA_{n}": address_of(url) for n, url in enumerate(replica_urls, 1)}
    with (directory / "haproxy.log").open("w") as log, socket.create_server(("127.0.0.1", 0)) as listener:
        at = listener.fileno()
        wanted = {"DLORA_BIND": f"fd@{at}", "DLORA_PROXY_SOCKET": str(admin), **replicas, **settings}
        process = subprocess.Popen(
            [program, "-db", "-f", str(CONFIGURATION)], env=wanted, stdout=log, stderr=log, pass_fds=[at]
        )
        try:
            eventually(lambda: process.poll() is not None or admin.exists())
            assert process.poll() is None, (directory / "haproxy.log").read_text()
            yield Haproxy(listener.getsockname()[1], admin)
        finally:
            process.kill()
            process.wait()
