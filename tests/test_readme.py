"""README: how long it is, what it says, and every command of it and of the first how-tos, as it stands there, with a
tiny model."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from families import save_tiny
from processes import BIN, END_TIMEOUT_S, Command, quiet_environment
from test_cli import free_port
from test_docs import rows, section

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
START = (ROOT / "docs/start.md").read_text()
HOW_TO = {path.stem: path.read_text() for path in (ROOT / "docs/how-to").glob("*.md")}
# What sets a machine up: .ci/wheel, test_bare_install.py, test_install.py and tests/arm do these things.
SET_UP = ("python3.11 -m venv", "pip install", "pip wheel", "python3 -m venv", "~/dlora/bin/pip", "uv tool", "sudo",
          "scp ", "export PATH", "getconf", "make edge-binary", "make edge-deb", "journalctl", "openssl req", "curl ",
          "OMP_WAIT_POLICY=PASSIVE ")  # fmt: skip


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
            examples = [{"prompt": f"w{number} w7", "completion": f" w{number + 1} w8"} for number in range(5, 29)]
            (directory / name).write_text("".join(json.dumps(example) + "\n" for example in examples))
        rows = [f"w{number} w7,w{number + 1} w8" for number in range(5, 29)]
        (directory / "mail.csv").write_text("\n".join(["question,answer", *rows, ""]))
        self.directory = directory
        self.port = free_port()
        self._address = address
        self._environment = {**quiet_environment(), "PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(directory)}

    def adapted(self, text: str) -> str:
        if text.startswith("dlora-cloud serve") and "--port" not in text:
            text = "dlora-cloud serve smollm2-135m --port 8765"  # the default port, which another process may have
        scheme = self._address.partition("://")[0]
        text = text.replace(self._address, f"{scheme}://127.0.0.1:{self.port}").replace("8765", str(self.port))
        return text.replace("smollm2-135m", str(self.directory / "tiny"))

    def start(self, line: str) -> subprocess.Popen[str]:
        program, *arguments = shlex.split(self.adapted(line), comments=True)
        return Command(
            [str(BIN / program), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd=self.directory, env=self._environment,
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
def test_every_command_of_the_readme_and_the_how_tos(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    shell, of_readme = Shell(tmp_path, "ws://127.0.0.1:8765"), commands(README)
    assert [" ".join(line.split()[:2]) for line in of_readme] == [
        "dlora-export smollm2-135m", "dlora-cloud serve", "dlora-edge train", "dlora-edge evaluate", "dlora-edge chat",
    ]  # fmt: skip
    of_docs = [
        *commands(HOW_TO["blocks-on-the-device"]),
        *commands(HOW_TO["train"]),
        *commands(HOW_TO["data"]),
        *commands(HOW_TO["evaluate"])[:2],
        *commands(HOW_TO["audit"]),
        *commands(HOW_TO["keep-a-run-going"]),
        *commands(HOW_TO["reports"]),
        *commands(HOW_TO["troubleshooting"]),
        *commands(HOW_TO["run-a-server"])[-4:],  # the others are those of a Raspberry Pi
    ]
    assert len(of_docs) >= 25
    for line in [*of_readme, *of_docs]:
        # Pages before it trained into the same directory.
        if re.match(r"dlora-edge train .*--(out my-adapter\b(?!.*--write-config)|config)", line):
            shutil.rmtree(tmp_path / "my-adapter", ignore_errors=True)
        if line.startswith("dlora-cloud serve"):
            started.append(listening(shell.start(line)))
        else:
            shell.run(line)
    (snippet,) = re.findall(r"```python\n(.*?)```", section(HOW_TO["adapters"], "Give it to PEFT"), re.S)
    shell.python(snippet)


def test_the_first_page_of_the_docs_has_the_commands_of_the_readme() -> None:
    first, second = ([shlex.split(line, comments=True) for line in commands(text)] for text in (START, README))
    assert first == second


@pytest.mark.slow
def test_raspberry_pi(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    shell, lines = Shell(tmp_path, "wss://train.example.org:8765"), commands(HOW_TO["raspberry-pi"])
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


# -- what it says ----------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 135
    assert len(README.split()) <= 1230
    prose = [line for line in re.sub(r"```.*?```", "", README, flags=re.S).splitlines() if not line.startswith("|")]
    assert [line for line in prose if len(line) > 160] == []


def measured(name: str) -> Any:
    return json.loads((ROOT / "docs/log/benchmarks" / f"{name}.json").read_text())


def test_the_numbers_of_the_readme_are_the_measured_ones() -> None:
    quality, memory, step = measured("trunk-quality"), measured("trunk-memory"), measured("step")
    recipes = ("lora-qv-all", "default", "trunk-12-r8")

    def losses(data: str) -> list[str]:
        of_data = [quality[data][recipe] for recipe in recipes]
        if data == "dialogue":
            return [f"{each['loss']:.4f}" for each in of_data]
        return [f"{each['loss']:.4f}, {100 * each['accuracy']:.1f} %" for each in of_data]

    trips = [str(step[name]["round_trips"]) for name in ("split_all", "split_default")]
    found = {name: cells for name, *cells in rows(section(README, "Numbers"))}
    assert found == {
        "ten intents: held-out loss, right": losses("b10"),
        "twenty other intents": losses("b20"),
        "open dialogue: held-out loss": losses("dialogue"),
        "kB a token, open dialogue": [f"{quality['dialogue'][each]['bytes_per_token'] / 1000:.1f}" for each in recipes],
        "round trips a step": [*trips, "0, once all texts are there"],
        "the device's peak memory": [f"{memory[recipe]:.0f} MB" for recipe in recipes],
    }
    lora, default = (measured("economy-results")["dialogue"][name]["chosen"] for name in recipes[:2])
    behind = [100 * (default[loss] / lora[loss] - 1) for loss in ("validation_loss", "loss")]
    assert "default is {:.1f} % behind LoRA, on the test answers of the table {:.1f} %.".format(*behind) in README
    bytes_of_default = [quality[data][recipes[1]]["bytes_per_token"] / 1000 for data in ("b10", "b20", "dialogue")]
    assert f"{min(bytes_of_default):.1f} to {max(bytes_of_default):.1f} kB" in README
    bytes_of_trunk = [quality[data][recipes[2]]["bytes_per_token"] / 1000 for data in ("b10", "b20", "dialogue")]
    assert f"{min(bytes_of_trunk):.1f} to {max(bytes_of_trunk):.1f} kB" in README
    assert f"differs by {measured('demo')['peft']['loss_difference']:.1e} in the demo" in README


def test_the_sizes_of_the_readme_are_the_measured_ones() -> None:
    shapes = measured("shapes")
    names = ("smollm2-360m", "gemma-3-1b", "llama-3.2-1b", "smollm2-1.7b", "qwen-3-4b", "llama-3.1-8b")
    found = [cells for _, *cells in rows(section(README, "Sizes"))]
    for cells, name in zip(found, names, strict=True):
        of_size = shapes[f"{name}_measured"]
        int8, int4 = (of_size[f"device_{head}"] for head in ("int8", "int4"))
        assert cells == [
            f"{int8['training_mb']:.0f}, {int4['training_mb']:.0f} MB",
            f"{of_size['server_rest_mb'] / 1000:.1f} GB",
            f"{int8['bytes_a_token'] / 1000:.1f}",
        ]


@pytest.mark.release
def test_the_repository_has_an_address() -> None:
    assert ".example" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def test_links_of_the_readme_are_absolute_where_a_package_index_shows_it() -> None:
    repository = "https://git.example.org/dlora"
    shown = runpy.run_path(str(ROOT / "setup.py"))["with_absolute_links"](README, repository)
    assert len(shown) > len(README)
    for link in re.findall(r"\]\(([^)]+)\)", shown):
        assert link.startswith(("https://", "#")), link
        if link.startswith(repository):
            kind, path = re.fullmatch(rf"{repository}/(blob|raw)/main/([^#]+)(?:#.*)?", link).groups()  # type: ignore[union-attr]
            assert (ROOT / path).exists()
            assert (kind == "raw") == path.endswith((".png", ".svg"))
