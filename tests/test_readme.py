"""Every command of README's "Use it" and of the Raspberry Pi how-to, as it stands there, with a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from families import save_tiny
from processes import BIN, END_TIMEOUT_S, quiet_environment
from test_cli import free_port
from test_howto_openai import is_ready
from waiting import eventually

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text().partition("## Use it")[2].partition("## It survives")[0]
AUDIT = (ROOT / "docs/howto/audit.md").read_text()
RASPBERRY_PI = (ROOT / "docs/howto/raspberry-pi.md").read_text()
# What sets a machine up: .ci/wheel, test_bare_install.py, test_install.py and tests/arm do these things.
SET_UP = ("python3.11 -m venv", "pip install", "pip wheel", "python3 -m venv", "~/dlora/bin/pip", "uv tool", "sudo",
          "scp ", "export PATH", "getconf", "make edge-binary", "journalctl")  # fmt: skip


def commands(text: str) -> list[str]:
    """Those of dlora, in order; there are no others but for what sets a machine up."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    found = [line for line in lines if line.startswith("dlora-")]
    assert [line for line in lines if not line.startswith(("dlora-", *SET_UP))] == []
    return found


class Shell:
    """Runs commands in a directory, with a tiny model in place of ``smollm2-135m`` and free ports."""

    def __init__(self, directory: Path, address: str) -> None:
        save_tiny(directory / "tiny", "llama", num_hidden_layers=14, max_position_embeddings=512)
        for name in ("chat.jsonl", "more.jsonl", "held-out.jsonl"):
            rows = [{"prompt": f"w{number} w7", "completion": f" w{number + 1} w8"} for number in range(5, 13)]
            (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.directory = directory
        self.port = free_port()
        self.endpoint = free_port()
        self._address = address
        self._environment = {**quiet_environment(), "PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(directory)}

    def adapted(self, text: str) -> str:
        scheme = self._address.partition("://")[0]
        text = text.replace(self._address, f"{scheme}://127.0.0.1:{self.port}").replace("8765", str(self.port))
        return text.replace("smollm2-135m", str(self.directory / "tiny")).replace("8080", str(self.endpoint))

    def start(self, line: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["sh", "-c", f"exec {self.adapted(line)}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, cwd=self.directory, env=self._environment,
        )  # fmt: skip

    def run(self, line: str) -> str:
        process = self.start(line)
        out, err = process.communicate("Hello\n", timeout=4 * END_TIMEOUT_S)
        assert process.returncode == 0, (line, err)
        return out

    def python(self, snippet: str) -> None:
        command = [sys.executable, "-c", self.adapted(snippet)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.directory, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """What is started is ended, well."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in reversed(processes):
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=END_TIMEOUT_S)
    assert [process.returncode for process in processes] == [0] * len(processes)


def listening(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    assert process.stderr is not None
    assert any("listening on" in line for line in process.stderr)
    return process


@pytest.mark.slow
def test_readme(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    shell, lines = Shell(tmp_path, "ws://127.0.0.1:8765"), commands(README)
    assert len(lines) == 13
    for line in lines:
        if line.startswith("dlora-cloud serve"):
            started.append(listening(shell.start(line)))
        elif line.startswith("dlora-edge serve"):
            started.append(listening(shell.start(line)))
            eventually(lambda: is_ready(shell.endpoint))
        else:
            shell.run(line)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    shell.python(snippet)


@pytest.mark.slow
def test_raspberry_pi(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    shell, lines = Shell(tmp_path, "wss://train.example.org:8765"), commands(RASPBERRY_PI)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "server.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.key")
    assert [line.split()[1] for line in lines] == [
        "smollm2-135m", "token", "doctor", "selftest", "train", "generate", "train",
    ]  # fmt: skip
    for line in lines:
        shell.run(line)
        if line.startswith("dlora-export"):
            shutil.copytree(tmp_path / "build" / "smollm2", tmp_path / "smollm2")
        if line.startswith("dlora-cloud token"):
            serve = "dlora-cloud serve smollm2-135m --port 8765 --tls-cert server.key --tls-key server.key"
            started.append(listening(shell.start(serve)))


def test_the_commands_of_an_audit_are_the_readmes() -> None:
    """Which are run above."""
    assert commands(AUDIT)
    assert set(commands(AUDIT)) <= set(commands(README))
