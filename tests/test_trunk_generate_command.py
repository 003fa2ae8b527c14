"""``generate``, ``chat``, ``serve`` and ``evaluate`` in ``trunk``, as their users meet it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from block_bundles import with_last_blocks
from endpoints import Place as EndpointPlace
from endpoints import endpoint_process
from generating import save_lora
from processes import run_edge
from serving import RunningServer, serving
from test_chat import chat_command, say
from test_cli import assert_fails
from tiny import Tiny, TinyFactory
from waiting import eventually

from dlora.protocol.adapter_record import TrainingRecord

PROMPT = ("--prompt", "w5 w6", "--max-new-tokens", 8)


def trained(device_blocks: int, **settings: Any) -> TrainingRecord:
    """What an adapter's record says of a run with so many blocks on the device."""
    given = {"steps": 1, "examples": 1, "tokens": 1, "labelled": 1, "bytes_per_token": 1, "round_trips_per_step": 0}
    return TrainingRecord(**given, recipe={"device_blocks": device_blocks}, versions={}, **settings)


def write_texts(directory: Path, *texts: dict[str, str]) -> Path:
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return data


@dataclass
class Place:
    """An adapter of the last two blocks of three that was trained in ``trunk``, and one that was not."""

    model: Tiny
    server: RunningServer
    trained: Path
    other: Path

    def words(self, adapter: Path, *more: object, bundle: Path | None = None) -> list[object]:
        where = ["--bundle", bundle or self.model.bundle, "--server", self.server.url, "--wire-dtype", "fp32"]
        return ["generate", *where, "--adapter", adapter, *more]


@pytest.fixture(scope="module")
def place(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    model, directory = tiny(blocks=3, device_blocks=3, head_dtype="fp32"), tmp_path_factory.mktemp("adapters")
    save_lora(model.bundle, directory / "trained", blocks=(1, 2), training=trained(2))
    save_lora(model.bundle, directory / "other", blocks=(1, 2))
    with serving(model.base) as server:
        yield Place(model, server, directory / "trained", directory / "other")


def answer(*words: object) -> dict[str, Any]:
    done = run_edge(*words, "--json")
    assert done.code == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_an_adapter_answers_in_the_mode_that_it_was_trained_in_or_another(place: Place) -> None:
    """The same words each time; in trunk a token is a round trip."""
    as_trained, split, other = (
        answer(*place.words(adapter, *PROMPT, "--draft", "off", *mode))
        for adapter, mode in ((place.trained, ()), (place.trained, ("--device-blocks", "0")), (place.other, ()))
    )
    assert as_trained["answer"] == split["answer"] == other["answer"]
    assert as_trained["round_trips"] == as_trained["tokens"] == 8
    assert split["round_trips"] == other["round_trips"] > 8 * 5
    asked = answer(*place.words(place.other, *PROMPT, "--draft", "off", "--device-blocks", 2))
    assert (asked["answer"], asked["round_trips"]) == (split["answer"], 8)
    bare = answer("generate", *place.words(place.other)[1:7], *PROMPT, "--draft", "off", "--device-blocks", 2)
    assert bare["answer"] != split["answer"]


def test_evaluate_finds_the_loss_of_split_and_sends_texts_only(place: Place, tmp_path: Path) -> None:
    data = write_texts(tmp_path, *({"prompt": f"w{n} w3", "completion": f" w{n + 1}"} for n in range(9)))

    def evaluate(adapter: Path, *mode: object) -> dict[str, Any]:
        return answer("evaluate", *place.words(adapter)[1:], "--data", data, "--threads", 1, *mode)

    split, trunk = evaluate(place.trained, "--device-blocks", "0"), evaluate(place.trained)
    assert trunk["loss"] == pytest.approx(split["loss"], rel=1e-5)
    close = {"loss": 0, "loss_interval": 0, "name": ""}
    assert {**trunk, **close} == {**split, **close}
    assert {**evaluate(place.other, "--device-blocks", 2), "name": ""} == {**trunk, "name": ""}
    bare = answer("evaluate", *place.words(place.other)[1:7], "--data", data, "--threads", 1, "--device-blocks", 2)
    assert bare["loss"] != trunk["loss"]
    warned = run_edge("evaluate", *place.words(place.trained)[1:], "--data", data, "--device-blocks", "0")
    assert "the server is now sent what it computes" in warned.stderr


def test_blocks_that_are_stored_otherwise_than_in_training_are_said(place: Place, tmp_path: Path) -> None:
    """By every command that runs them."""
    data = write_texts(tmp_path, {"text": "w5 w6 w7"})
    save_lora(place.model.bundle, tmp_path / "of int8", blocks=(1, 2), training=trained(2, block_dtype="int8"))
    line = "the adapter was trained with blocks stored as int8, and the bundle's are fp32"
    for words in (place.words(tmp_path / "of int8", *PROMPT), ["evaluate", *place.words(tmp_path / "of int8")[1:]]):
        words += ["--data", data] if words[0] == "evaluate" else []
        assert line in run_edge(*words).stderr
        assert line not in run_edge(*words, "--device-blocks", "0").stderr


def test_what_evaluate_cannot_do_is_one_line_before_a_server_is_asked(place: Place, tmp_path: Path) -> None:
    save_lora(place.model.bundle, tmp_path, blocks=(0, 1))
    text = "reaches down to block 0, which the server runs; use --device-blocks 0"
    where = ("--bundle", place.model.bundle, "--server", "ws://127.0.0.1:9", "--adapter", tmp_path)
    data = write_texts(tmp_path, {"text": "w5 w6 w7"})
    assert_fails(run_edge("evaluate", *where, "--data", data, "--device-blocks", 2), 2, text)


def test_without_a_server_all_blocks_run_here(place: Place, tmp_path: Path) -> None:
    """As the adapter was trained, or as it is said; never by a server that was not asked for."""
    bundle = place.model.bundle
    save_lora(bundle, tmp_path, blocks=(1, 2), training=trained(3))
    wanted = answer(*place.words(place.other, *PROMPT))["answer"]
    words = ("generate", "--bundle", bundle, "--adapter", tmp_path, *PROMPT)
    found = [answer(*words), answer(*words, "--device-blocks", "all")]
    assert [each["answer"] for each in found] == [wanted] * 2
    assert found[0]["round_trips"] == found[0]["bytes_sent"] == 0
    asked = ("--server", place.server.url)
    refused = run_edge(*words, "--device-blocks", "all", *asked)
    assert_fails(refused, 2, "--device-blocks all asks no server: leave --server out")
    assert_fails(run_edge(*words, "--device-blocks", "0"), 2, "--server is missing")
    # As it was trained, or not at all: nothing of it is told to a server that its user has not told it to.
    fewer = with_last_blocks(bundle, tmp_path / "bundle", 2)
    assert_fails(run_edge(*place.words(tmp_path, *PROMPT, bundle=fewer)), 4, "export it again with --device-blocks 3")


def test_a_chat_says_what_it_says_in_the_mode_split(place: Place) -> None:
    asked = *PROMPT[2:], "-v", "--draft", "off"
    lines = ("w5 w6", "w7", "/adapter none", "/reset", "w5 w6", f"/adapter {place.trained}", "/reset", "w5 w6")
    said = [
        say(chat_command(place.model.bundle, place.server, "--adapter", place.trained, *asked, *mode), *lines)
        for mode in ((), ("--device-blocks", "0"))
    ]
    assert said[0].stdout == said[1].stdout
    assert said[0].stdout.splitlines()[0] == said[0].stdout.splitlines()[-1]
    assert said[0].stderr.count("a token took 1.00 round trips") >= 2


def test_the_endpoint_serves_both_kinds_beside_each_other(place: Place) -> None:
    bundle = place.model.bundle
    endpoint = EndpointPlace(bundle, place.model.model, place.trained.parent, place.server)
    messages = [{"role": "user", "content": "w5 w6"}]
    wanted = answer(*place.words(place.trained, *PROMPT))["answer"]
    with endpoint_process(endpoint, "--adapters", place.trained.parent, "--temperature", 0) as running:
        eventually(running.is_ready)
        assert set(running.models) >= {"trained", "other"}
        for name in ("trained", "other", "trained"):
            asked = {"model": name, "messages": messages, "max_tokens": 8}
            status, body = running.request("/v1/chat/completions", asked)
            assert (status, body["choices"][0]["message"]["content"]) == (200, wanted)
