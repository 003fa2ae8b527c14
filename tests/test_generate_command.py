"""``dlora-edge generate`` as its users meet it: what it prints, as it comes, and what it says of mistakes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from generating import save_random_adapter
from processes import BIN, cloud_process, finish, run_command, run_edge, start_edge
from serving import RunningServer, serving
from test_cli import assert_fails, free_port
from tiny import TinyFactory

from dlora.edge.data.prompt import prompt_tokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.generation.text import AnswerText
from dlora.protocol.errors import DataError, DloraError, UsageError

LONG = {"max_position_embeddings": 256}


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny("llama", head_dtype="fp32", **LONG).bundle


@pytest.fixture(scope="module")
def server(tiny: TinyFactory) -> Iterator[RunningServer]:
    with serving(tiny("llama", **LONG).base) as running:
        yield running


@pytest.fixture(scope="module")
def where(bundle: Path, server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The options of an adapter in use."""
    adapter = tmp_path_factory.mktemp("adapter")
    save_random_adapter(bundle, server.url, adapter)
    return ["--bundle", bundle, "--server", server.url, "--adapter", adapter, "--wire-dtype", "fp32"]


def answer_of(*arguments: object) -> dict[str, object]:
    done = run_edge("generate", *arguments, "--json")
    assert done.code == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_answer_is_printed_and_what_it_took_where_that_is_asked_for(where: list[object]) -> None:
    plain, told = (run_edge("generate", *where, "--prompt", "w5 w6", "--max-new-tokens", 12, *v) for v in ([], ["-v"]))
    assert (plain.code, plain.stderr) == (0, "")
    found = answer_of(*where, "--prompt", "w5 w6", "--max-new-tokens", 12)
    assert plain.stdout == told.stdout == f"{found['answer']}\n"
    assert told.stderr.startswith("12 tokens, ")
    assert "round trips and" in told.stderr
    assert (found["finish_reason"], found["tokens"], found["prompt"]) == ("length", 12, "w5 w6")
    assert found["bytes_sent"] > 0 < found["round_trips"]


def test_a_prompt_may_be_piped_in_or_be_a_conversation(where: list[object], tmp_path: Path) -> None:
    """And each says what the others say."""
    wanted = answer_of(*where, "--prompt", "w5 w6", "--max-new-tokens", 8)["answer"]
    command = [str(BIN / "dlora-edge"), "generate", *map(str, where), "--max-new-tokens", "8"]
    piped = run_command(command, said="w5 w6\n")
    assert piped.stdout == f"{wanted}\n"
    messages = tmp_path / "talk.json"
    for content in ([{"role": "user", "content": "w5 w6"}], {"messages": [{"role": "user", "content": "w5 w6"}]}):
        messages.write_text(json.dumps(content))
        assert answer_of(*where, "--messages", messages, "--max-new-tokens", 8)["answer"] == wanted
    told = answer_of(*where, "--prompt", "w5 w6", "--system", "w9", "--max-new-tokens", 8)
    messages.write_text(json.dumps([{"role": "system", "content": "w9"}, {"role": "user", "content": "w5 w6"}]))
    assert answer_of(*where, "--messages", messages, "--max-new-tokens", 8)["answer"] == told["answer"] != wanted
    bare = answer_of(*where, "--prompt", "w5 w6", "--no-chat-template", "--max-new-tokens", 8)
    assert bare["prompt_tokens"] == told["prompt_tokens"] - 9 or bare["answer"] != wanted


def test_the_choice_of_tokens_obeys_the_options(where: list[object]) -> None:
    asked = [*where, "--prompt", "w5 w6", "--max-new-tokens", 24]
    drawn = [
        answer_of(*asked, "--temperature", 1.5, "--seed", seed, "--draft", draft)
        for seed, draft in ((1, "off"), (1, "server"), (2, "prompt"))
    ]
    assert drawn[0]["answer"] == drawn[1]["answer"] != drawn[2]["answer"]
    found = answer_of(*asked, "--logprobs", 2)
    tokens = found["logprobs"]
    assert isinstance(tokens, list)
    assert len(tokens) == 24
    assert all(token["top"][0]["id"] == token["id"] and token["logprob"] <= 0 for token in tokens)
    text = str(drawn[0]["answer"])
    stop = answer_of(*asked, "--temperature", 1.5, "--seed", 1, "--stop", "nowhere", "--stop", text[9:12])
    assert stop["finish_reason"] == "stop"
    assert stop["answer"] == text[: text.index(text[9:12])]


def test_text_comes_while_it_is_made(where: list[object]) -> None:
    process = start_edge("generate", *where, "--prompt", "w5 w6", "--max-new-tokens", 200)
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    assert first
    assert process.poll() is None  # 199 more tokens are to come
    process.send_signal(signal.SIGINT)
    assert_fails(finish(process), 130, "interrupted")


def test_a_server_that_is_killed_and_started_again_is_not_noticed(tiny: TinyFactory, tmp_path: Path) -> None:
    """kill -9 in the middle of an answer; the other server has seen nothing of it."""
    port, long = free_port(), {"max_position_embeddings": 2048}
    bundle, model = tiny("llama", head_dtype="fp32", **long).bundle, tiny("llama", **long).model
    asked = ["generate", "--bundle", bundle, "--server", f"ws://127.0.0.1:{port}", "--prompt", "w5 w6",
             "--max-new-tokens", 700, "--temperature", 1, "--seed", 4, "--wire-dtype", "fp32"]  # fmt: skip
    with cloud_process(model, tmp_path, "--port", port):
        wanted = run_edge(*asked).stdout
        process = start_edge(*asked)
        assert process.stdout is not None
        start = os.read(process.stdout.fileno(), 1)
    # The context has ended: that server is gone.
    assert process.poll() is None
    with cloud_process(model, tmp_path, "--port", port):
        done = finish(process)
    assert done.code == 0, done.stderr
    assert start.decode() + done.stdout == wanted
    assert "trying again" in done.stderr


@pytest.mark.parametrize(("arguments", "error", "words"), [
    (["--prompt", "w1", "--messages", "x.json"], UsageError, "--prompt or --messages, not both"),
    (["--prompt", "w1", "--top-p", "1.5"], UsageError, "top_p must be from 0 to 1, not 1.5"),
    (["--messages", "nowhere.json"], DataError, "nowhere.json cannot be read"),
    (["--prompt", "w1", "--stop", ""], UsageError, "stop strings must not be empty"),
    (["--messages", "x.json", "--system", "w1"], UsageError, "--system needs a --prompt"),
    (["--prompt", "w1 " * 300], DataError, "say less"),
])  # fmt: skip
def test_a_mistake_is_one_line(
    arguments: list[str], error: type[DloraError], words: str, where: list[object], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text('[{"role": "user", "content": "w1"}]')
    assert_fails(run_edge("generate", *where, *arguments), error.exit_code, words)


@pytest.mark.parametrize(("content", "words"), [
    ("{", "is not JSON"), ("[]", "a list of at least one"), ("[1]", "message 1 must be an object with a role"),
    ('[{"role": "user"}, {"content": "x"}]', "message 2"), ("\xff", "is not JSON in UTF-8"), ("[" * 100000, "JSON"),
])  # fmt: skip
def test_a_conversation_that_is_none_is_one_line(content: str, words: str, where: list[object], tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content.encode("latin-1"))
    assert_fails(run_edge("generate", *where, "--messages", path), DataError.exit_code, words)


# -- text ---------------------------------------------------------------------------------------------------


class Pieces:
    """A stream whose tokens are numbers of pieces."""

    def __init__(self, *pieces: str) -> None:
        self._pieces = pieces
        self.is_closed = False

    def push(self, token: int) -> str:
        return self._pieces[token]

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(("pieces", "stop", "wanted"), [
    (["ab", "cd", "ef"], [], ["ab", "cd", "ef", ""]),
    (["ab", "cd", "ef"], ["de"], ["ab", "c", "", ""]),
    (["ab", "cd", "xf"], ["de"], ["ab", "c", "dxf", ""]),
    (["a", "a", "a", "b"], ["aab"], ["", "", "a", "", ""]),
    (["xyz"], ["yz", "xy"], ["", ""]),
    (["a", "##"], ["###"], ["a", "", "##"]),
])  # fmt: skip
def test_what_may_become_a_stop_string_is_held_back(pieces: list[str], stop: list[str], wanted: list[str]) -> None:
    stream = Pieces(*pieces)
    text = AnswerText(stream, stop)  # type: ignore[arg-type]
    assert [*map(text.push, range(len(pieces))), text.finish()] == wanted
    text.close()
    assert text.text == "".join(wanted)
    assert stream.is_closed


def test_streams_of_several_answers_do_not_mix(bundle: Path) -> None:
    with prompt_tokenizer(Bundle.open(bundle)) as tokenizer:
        streams = [tokenizer.stream() for _ in range(2)]
        ids = [tokenizer.encode_text(text).tolist() for text in ("w5 w6 w7", "w8 w9 w10")]
        found = ["", ""]
        for pair in zip(*ids, strict=True):
            for index, token in enumerate(pair):
                found[index] += streams[index].push(token)
        assert found == [tokenizer.decode(each) for each in ids]
