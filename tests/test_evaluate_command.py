"""``dlora-edge evaluate`` asks questions and compares adapters: the numbers are those of the model itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generating import save_random_adapter
from processes import Finished, run_edge
from serving import serving
from test_cli import Place, assert_fails
from tiny import Tiny, TinyFactory

USAGE, DATA, CHECKPOINT = 2, 3, 10


@pytest.fixture(scope="module")
def model(tiny: TinyFactory) -> Tiny:
    return tiny("llama", head_dtype="fp32", max_position_embeddings=512)


@pytest.fixture(scope="module")
def place(model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("evaluate")
    choices = [f"w{number}" for number in range(4, 16)]
    rows = [
        {"prompt": f"w{number} w2 w3", "completion": f" {choices[number]}", "choices": choices} for number in range(12)
    ]
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(model.base) as server:
        save_random_adapter(model.bundle, server.url, directory / "mine")
        yield Place(model.bundle, data, server.url)


def evaluate(place: Place, *options: object) -> Finished:
    return run_edge(
        "evaluate", "--bundle", place.bundle, "--server", place.url, "--wire-dtype", "fp32", "--threads", 1,
        "--data", place.data, *options,
    )  # fmt: skip


def found(place: Place, *options: object) -> dict[str, Any]:
    done = evaluate(place, *options, "--json")
    assert done.code == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_generated_answers_are_what_torch_generates(place: Place, model: Tiny, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    saved = tmp_path / "answers.jsonl"
    result = found(place, "--answers", "exact", "--max-new-tokens", 5, "--save", saved)
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert result["questions"] == len(rows) == 12
    tokenizer = AutoTokenizer.from_pretrained(model.model)
    for row in rows:
        ids = torch.tensor([tokenizer(row["asked"])["input_ids"]])
        made = model.base.model.generate(ids, max_new_tokens=5, do_sample=False)
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert row["answers"][0]["answer"] == text
        assert row["answers"][0]["right"] == (text.split() == row["reference"].split())
    assert result["right"] == np.mean([row["answers"][0]["right"] for row in rows])


def test_likeliest_choice_is_what_torch_finds(place: Place, model: Tiny, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    saved = tmp_path / "answers.jsonl"
    found(place, "--answers", "likelihood", "--save", saved)
    tokenizer = AutoTokenizer.from_pretrained(model.model)
    for line in saved.read_text().splitlines():
        row, scores = json.loads(line), {}
        asked = tokenizer(row["asked"])["input_ids"]
        for choice in range(4, 16):
            ids = tokenizer(f"{row['asked']} w{choice}")["input_ids"]
            ids = torch.tensor([[*ids, tokenizer.eos_token_id] if ids[-1] != tokenizer.eos_token_id else ids])
            with torch.no_grad():
                likely = model.base.model(ids).logits[0].log_softmax(-1)
            places = range(len(asked) - (asked[-1] == tokenizer.eos_token_id), ids.shape[1])
            scores[f"w{choice}"] = sum(float(likely[at - 1, ids[0, at]]) for at in places)
        assert row["answers"][0]["answer"] == max(scores, key=scores.__getitem__)


def test_adapters_are_compared_on_the_same_examples(place: Place) -> None:
    mine = place.data.with_name("mine")
    options = ("--answers", "contains", "--max-new-tokens", 4)
    both = found(place, "--adapter", mine, "--against", "base", *options)
    alone = {name: found(place, *more, *options) for name, more in (("mine", ("--adapter", mine)), ("base", ()))}
    (other,) = both["against"]
    for name, result in (("mine", both), ("base", other)):
        for measure in ("loss", "token_accuracy", "exact_match", "right", "loss_interval", "right_interval"):
            assert result[measure] == alone[name][measure], (name, measure)
    difference = other["difference"]["loss"]
    assert difference["mean"] == pytest.approx(both["loss"] - other["loss"])
    assert difference["interval"][0] <= difference["mean"] <= difference["interval"][1]
    assert both["loss_interval"][0] <= both["loss"] <= both["loss_interval"][1]
    shown = evaluate(place, "--adapter", mine, "--against", "base", *options, "--show", 1)
    assert shown.code == 0, shown.stderr
    assert "answers right (contains)" in shown.stdout
    assert f"{both['loss']:.4f}" in shown.stdout
    assert shown.stdout.count("reference") == 1
    assert "95 % intervals" in shown.stdout


def test_a_limit_takes_fewer_rows(place: Place) -> None:
    result = found(place, "--answers", "exact", "--limit", 3, "--max-new-tokens", 2)
    assert (result["questions"], result["examples"]) == (3, 3)
    assert found(place, "--limit", 20)["examples"] == 12


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--pattern", "x"], USAGE, "--pattern needs --answers"),
        (["--save", "x"], USAGE, "--save needs --answers"),
        (["--answers", "exact", "--pattern", "x"], USAGE, "--pattern is for --answers regex"),
        (["--answers", "regex", "--pattern", "("], USAGE, "no regular expression"),
        (["--answers", "likelihood", "--choices", "a"], USAGE, "--choices needs two answers"),
        (["--against", "/nowhere"], CHECKPOINT, "/nowhere"),
    ],
)
def test_options_that_cannot_be_are_one_line(place: Place, options: list[object], code: int, words: str) -> None:
    assert_fails(evaluate(place, *options), code, words)


def test_questions_that_cannot_be_scored_are_one_line(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "w1 w2", "completion": " w3"}\n')
    other = Place(place.bundle, path, place.url)
    assert_fails(evaluate(other, "--answers", "regex"), DATA, "d.jsonl:1: it names no answers to look for")
    assert_fails(evaluate(other, "--answers", "likelihood"), DATA, "d.jsonl:1: it names no answers to choose among")
    none = evaluate(other, "--answers", "likelihood", "--choices", "w4,w5")
    assert_fails(none, DATA, "d.jsonl:1: its answer 'w3' is none of the choices w4, w5")
    path.write_text('{"text": "w1 w2 w3"}\n')
    assert_fails(evaluate(other, "--answers", "exact"), DATA, "d.jsonl:1: text asks nothing")
