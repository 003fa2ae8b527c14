"""Every command of docs/how-to/openai.md, as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from endpoints import endpoint_place
from processes import BIN, END_TIMEOUT_S, quiet_environment
from test_cli import free_port
from waiting import eventually

ROOT = Path(__file__).parents[1]
HOW_TO = (ROOT / "docs/how-to/openai.md").read_text()


def commands(text: str, *beginnings: str) -> list[str]:
    """The lines of the shell's blocks that begin so, or have it after a pipe."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if any(line.startswith(each) or f"| {each}" in line for each in beginnings)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A directory in which the commands can run, and a server's address."""
    directory = tmp_path_factory.mktemp("howto")
    (directory / "build").mkdir()
    with endpoint_place(directory / "made") as made:
        (directory / "build" / "smollm2").symlink_to(made.bundle)
        shutil.copytree(made.adapters / "first", directory / "my-adapter")
        yield directory, made.cloud.url


def shell(line: str, place: tuple[Path, str], port: int = 8080, said: str = "") -> subprocess.Popen[str]:
    directory, url = place
    line = line.replace("ws://127.0.0.1:8765", url).replace("8080", str(port))
    # A drawn answer may be empty; with a seed it is the same each time, and not empty. It need not be long.
    drawn = {"DLORA_EDGE_SEED": "0", "DLORA_EDGE_MAX_NEW_TOKENS": "40"}
    environment = {**quiet_environment(), **drawn, "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(directory)}
    process = subprocess.Popen(
        ["sh", "-c", f"exec {line}" if "|" not in line else line], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=directory, env=environment,
    )  # fmt: skip
    assert process.stdin is not None
    if said:
        process.stdin.write(said)
    return process


@pytest.mark.parametrize("line", commands(HOW_TO, "dlora-edge generate", "dlora-edge chat"))
def test_an_answer_comes(line: str, place: tuple[Path, str]) -> None:
    process = shell(line, place, said="Hello\n/exit\n" if "chat" in line else "")
    out, err = process.communicate(timeout=END_TIMEOUT_S)
    assert process.returncode == 0, err
    assert out.strip()


def test_the_endpoint_answers_its_clients(place: tuple[Path, str]) -> None:
    port = free_port()
    (line,) = commands(HOW_TO, "dlora-edge serve")
    process = shell(line, place, port)
    try:
        eventually(lambda: is_ready(port))
        if shutil.which("curl"):
            for command in commands(HOW_TO, "curl"):
                client = shell(command, place, port)
                out, err = client.communicate(timeout=END_TIMEOUT_S)
                assert client.returncode == 0, err
                assert "my-adapter" in out
        snippet = "\n".join([*re.findall(r"```python\n(.*?)```", HOW_TO, re.S), "print()", "print(call.name)"])
        done = subprocess.run(
            [sys.executable, "-c", snippet.replace("8080", str(port))], capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "add"
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=END_TIMEOUT_S)
    assert process.returncode == 0


def is_ready(port: int) -> bool:
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except ConnectionError:
        return False
