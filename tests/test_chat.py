"""``dlora-edge chat`` in a terminal, and piped: what is said, stopped, saved and taken back."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from generating import save_random_adapter
from processes import BIN, END_TIMEOUT_S, Finished, quiet_environment, run_command, run_edge
from serving import RunningServer, serving
from terminals import terminal
from test_cli import assert_fails, free_port
from tiny import TinyFactory

from dlora.protocol.errors import CheckpointError, ConnectionFailedError

LONG = {"max_position_embeddings": 2048}


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny("llama", head_dtype="fp32", **LONG).bundle


@pytest.fixture(scope="module")
def server(tiny: TinyFactory) -> Iterator[RunningServer]:
    with serving(tiny("llama", **LONG).base) as running:
        yield running


@pytest.fixture(scope="module")
def adapters(bundle: Path, server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    save_random_adapter(bundle, server.url, directory / "mine")
    return directory


def chat_command(bundle: Path, server: RunningServer, *arguments: object) -> list[str]:
    words = ["chat", "--bundle", bundle, "--server", server.url, "--wire-dtype", "fp32", "--temperature", 0, *arguments]
    return [str(BIN / "dlora-edge"), *map(str, words)]


def say(command: list[str], *lines: str) -> Finished:
    return run_command(command, said="".join(f"{line}\n" for line in lines))


def test_a_chat_is_answered_turn_by_turn(bundle: Path, server: RunningServer, adapters: Path, tmp_path: Path) -> None:
    """Each answer is the one that ``generate`` gives to all that was said before it."""
    saved = tmp_path / "talk.json"
    command = chat_command(bundle, server, "--system", "w9", "--adapter", adapters / "mine", "--max-new-tokens", 9)
    done = say([*command, "-v"], "w5 w6", '"""w7', 'w8"""', f"/save {saved}", "/exit", "never said")
    assert done.code == 0, done.stderr
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in messages[:2]] == ["w9", "w5 w6"]
    assert messages[3]["content"] == "w7\nw8"
    assert done.stdout.splitlines() == [messages[2]["content"], messages[4]["content"]]
    for last in (1, 3):
        (tmp_path / "asked.json").write_text(json.dumps(messages[: last + 1]))
        wanted = run_edge(
            "generate", "--bundle", bundle, "--server", server.url, "--adapter", adapters / "mine",
            "--messages", tmp_path / "asked.json", "--max-new-tokens", 9, "--wire-dtype", "fp32",
        )  # fmt: skip
        assert wanted.stdout == f"{messages[last + 1]['content']}\n"
    assert done.stderr.count("tokens/s") == 2


def test_another_adapter_and_a_new_beginning(bundle: Path, server: RunningServer, adapters: Path) -> None:
    command = chat_command(bundle, server, "--adapters", adapters, "--max-new-tokens", 9)
    done = say(command, "w5 w6", "/adapter mine", "/reset", "w5 w6", "/adapter none", "/reset", "w5 w6")
    plain, mine, again = done.stdout.splitlines()
    assert plain == again != mine
    assert "now with" in done.stderr


def test_mistakes_do_not_end_the_chat(bundle: Path, server: RunningServer) -> None:
    command = chat_command(bundle, server, "--max-new-tokens", 4, "--verbose")
    mistakes = ["/nonsense", "/save", "/adapter nowhere", "/save /nowhere/x", f"/save {bundle}"]
    done = say(command, *mistakes, "w5", "/help", "w " * 3000, "w5")
    assert done.code == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [words in line for line, words in zip(errors, (
        "/nonsense is not understood", "/save is not understood", "nowhere is not a PEFT adapter", "/nowhere",
        "is no file", "say less",
    ), strict=True)] == [True] * 6  # fmt: skip
    assert "/reset" in done.stdout
    assert done.stderr.count("tokens/s") == 2
    assert "Traceback" not in done.stderr


def test_what_is_not_utf8_is_said_again(bundle: Path, server: RunningServer) -> None:
    """And half a character at the end is the end."""
    done = subprocess.run(
        chat_command(bundle, server, "--max-new-tokens", 4), input=b"\xff\nw5\n/save ~nobody-at-all/x\nw6\xe2\x82",
        capture_output=True, timeout=END_TIMEOUT_S, env={**quiet_environment(), "PYTHONIOENCODING": "utf-8:strict"},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"this is not UTF-8") == 2
    assert b"error: there is no such place" in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_old_turns_are_left_out_where_there_is_no_room(bundle: Path, server: RunningServer, tmp_path: Path) -> None:
    command = chat_command(bundle, server, "--max-new-tokens", 4, "--context-length", 80)
    turns = [f"w{number} " * 12 for number in range(10, 16)]
    done = say(command, *turns, f"/save {tmp_path / 'talk.json'}")
    assert done.code == 0, done.stderr
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert messages[-2]["content"] == turns[-1]
    assert 2 <= len(messages) < 12
    assert messages[0]["role"] == "user"
    assert "its oldest turn is left out" in done.stderr
    assert len(done.stdout.splitlines()) == len(turns)


def test_ctrl_c_stops_the_answer_and_not_the_chat(bundle: Path, server: RunningServer, tmp_path: Path) -> None:
    with terminal(*chat_command(bundle, server, "--max-new-tokens", 1900, "--draft", "off")) as window:
        window.wait_for("> ")
        window.wait_for("> ", interrupting=True)  # leaves the line that is being written
        window.type("w5 w6\n")
        window.wait_for("w5 w6\r\nw")  # the answer has begun
        window.process.send_signal(signal.SIGINT)
        window.wait_for("stopped")
        window.wait_for("> ")
        window.type(f"/save {tmp_path / 'talk.json'}\n")
        window.wait_for("saved to")
        window.wait_for("> ")
        window.type("\x04")
        assert window.process.wait(END_TIMEOUT_S) == 0
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[1]["content"]


def test_mistakes_at_the_start_are_one_line(bundle: Path, server: RunningServer, tmp_path: Path) -> None:
    where = ["chat", "--bundle", bundle]
    done = run_edge(*where, "--server", f"ws://127.0.0.1:{free_port()}")
    assert_fails(done, ConnectionFailedError.exit_code, "dlora-cloud serve")
    done = run_edge(*where, "--server", server.url, "--adapter", tmp_path / "nowhere")
    assert_fails(done, CheckpointError.exit_code, "nowhere")
