"""``dlora-edge data``: what is learnt is shown, counted and split; and training holds some rows out by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Finished, run_edge
from serving import serving
from test_cli import Place, assert_fails
from tiny import TinyFactory

DATA, USAGE = 3, 2
SAMPLES = Path(__file__).parent / "data_forms"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(number: int, answer: str = "") -> dict[str, str]:
    return {"prompt": f"w{number} w1", "completion": answer or f" w{number + 1}"}


@pytest.fixture(scope="module")
def place(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("data")
    model = tiny()
    with serving(model.base) as server:
        yield Place(model.bundle, write(directory / "data.jsonl", *map(pair, range(40))), server.url)


def look(place: Place, file: Path, *options: object) -> Finished:
    return run_edge("data", file, "--bundle", place.bundle, *options)


def found(place: Place, file: Path, *options: object) -> dict[str, Any]:
    done = look(place, file, *options, "--json")
    assert done.code == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_rows_are_shown_with_what_is_learnt(place: Place, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
    file = write(tmp_path / "d.jsonl", {"messages": messages}, {"messages": messages[:1] * 2 + messages[1:]})
    done = look(place, file, "--show", 1)
    assert done.code == 0, done.stderr
    first, *_ = done.stdout.split("\n\n")
    place_line, text = first.split("\n", 1)
    assert place_line == f"{file}:1"
    assert text.count("⟦") == text.count("⟧") == 1
    learnt = text[text.index("⟦") + 1 : text.index("⟧")]
    assert learnt.lstrip().startswith("w7")
    assert "w5" not in learnt
    assert "chat messages, 2 rows" in done.stdout
    second = look(place, file, "--line", 2)
    assert second.stdout.startswith(f"{file}:2\n")


def test_json_has_tokens_and_counts(place: Place, tmp_path: Path) -> None:
    rows = [pair(1), pair(2), pair(1), pair(3, " ."), pair(4, " "), pair(5)]
    result = found(place, write(tmp_path / "d.jsonl", *rows), "--show", 9)
    assert (result["form"], result["rows"], result["examples"]) == ("prompt and completion", 6, 6)
    assert result["duplicates"] == {"count": 1, "first": [f"{tmp_path}/d.jsonl:3"]}
    assert result["empty_answers"] == {"count": 1, "first": [f"{tmp_path}/d.jsonl:5"]}
    assert result["wordless_answers"] == {"count": 1, "first": [f"{tmp_path}/d.jsonl:4"]}
    assert sum(bar["examples"] for bar in result["histogram"]) == 6
    assert result["tokens"] == sum(len(row["ids"]) for row in result["shown"])
    assert result["labelled"] == sum(sum(row["learnt"]) for row in result["shown"])
    for row in result["shown"]:
        assert len(row["ids"]) == len(row["tokens"]) == len(row["learnt"])
    assert "".join(result["shown"][0]["tokens"]).startswith("w1 w1 w2")


def test_what_is_shown_is_what_training_reads(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_edge(*place.train(out), "--json")
    assert done.code == 0, done.stderr
    data = json.loads((out / "run.json").read_text())
    result = found(place, place.data, "--hold-out", "auto")
    parts = data["data"], data["eval_data"]
    assert sum(part["examples"] for part in parts) == result["examples"] == 40
    assert sum(part["tokens"] for part in parts) == result["tokens"]
    assert sum(part["labelled"] for part in parts) == result["labelled"]
    assert data["eval_data"]["examples"] == result["held_out"] == 4


def test_rows_that_cannot_be_learnt_from_are_listed(place: Place, tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", pair(1), {"prompt": "w1"}, {"text": "w1"}, pair(2))
    done = look(place, file)
    assert_fails(done, DATA, f"2 rows cannot be learnt from; the first: {file}:2: no form of data that is known")
    assert "2 refused by train" in done.stdout
    assert "prompt and completion, 4 rows" in done.stdout
    assert f"{file}:3: this is text ('text'), and the rows from {file}:1 on" in done.stdout
    shown = look(place, file, "--line", 2)
    assert_fails(shown, DATA, f"{file}: no row that can be learnt from begins at line 2")
    file = write(tmp_path / "long.jsonl", pair(1, " w2" * 60))
    long = look(place, file, "--max-length", 20, "--too-long", "truncate")
    assert "cut to 20 tokens" in long.stdout


def test_parts_are_written_and_are_the_rows(place: Place, tmp_path: Path) -> None:
    rows = [{**pair(number % 30), "id": number} for number in range(60)]
    file, out = write(tmp_path / "d.jsonl", *rows), tmp_path / "parts"
    result = found(place, file, "--hold-out", 0.25, "--out", out)
    texts = [(out / f"{name}.jsonl").read_text() for name in ("train", "held-out")]
    parts = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert sorted((row for part in parts for row in part), key=lambda row: row["id"]) == rows
    assert len(parts[1]) == result["held_out"] == 14  # every row twice: pairs stay together
    prompts = [{row["prompt"] for row in part} for part in parts]
    assert prompts[0].isdisjoint(prompts[1])
    assert found(place, out / "train.jsonl", "--eval", out / "held-out.jsonl")["in_held_out"]["count"] == 0
    overlap = found(place, file, "--eval", out / "held-out.jsonl")["in_held_out"]
    assert overlap["count"] == 14
    notes = found(place, SAMPLES / "notes", "--hold-out", 0.4, "--out", tmp_path / "notes")
    assert notes["held_out"] == 1
    assert len((tmp_path / "notes/train.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "x"], "--out needs --hold-out"),
        (["--hold-out", 0.1, "--eval", "x"], "leave one of them out"),
        (["--hold-out", "some"], "--hold-out some is not understood"),
        (["--columns", "a"], "--columns"),
        (["--max-length", 10**6], "--max-length 1000000 is over"),
    ],
)
def test_options_that_cannot_be_are_one_line(place: Place, options: list[object], words: str) -> None:
    assert_fails(look(place, place.data, *options), USAGE, words)


def test_files_without_enough_rows_are_one_line(place: Place, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert_fails(look(place, tmp_path / "empty.jsonl"), DATA, "no examples in it")
    assert_fails(look(place, write(tmp_path / "one.jsonl", pair(1)), "--hold-out", 0.5), DATA, "two different rows")


# -- training without --eval ------------------------------------------------------------------------------------


def test_training_holds_some_rows_out_and_says_so(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_edge(*place.train(out, keep="best"), "--json")
    assert done.code == 0, done.stderr
    assert "held out: 4 of 40 rows, to see how well the rest teaches; --hold-out 0 trains on all" in done.stderr
    summary = json.loads(done.stdout)
    assert summary["eval_loss_after"] is not None
    evaluated = run_edge(
        "evaluate", "--bundle", place.bundle, "--server", place.url, "--data", place.data, "--adapter", out / "best",
        "--hold-out", "auto", "--threads", 1, "--json",
    )  # fmt: skip
    assert json.loads(evaluated.stdout)["loss"] == pytest.approx(summary["eval_loss_best"], abs=1e-5)
    again = run_edge("resume", out, "--steps", 3, "--json")
    assert again.code == 0, again.stderr
    assert json.loads(again.stdout)["evaluations"][-1]["step"] == 3


def test_split_0_trains_on_all(place: Place, tmp_path: Path) -> None:
    done = run_edge(*place.train(tmp_path / "out", hold_out=0), "--json")
    assert done.code == 0, done.stderr
    assert "held out" not in done.stderr
    assert json.loads(done.stdout)["evaluations"] == []
    assert_fails(run_edge(*place.train(tmp_path / "b", hold_out=0, keep="best")), USAGE, "--keep best needs --eval")
    few = write(tmp_path / "few.jsonl", *map(pair, range(9)))
    asked = run_edge("evaluate", "--bundle", place.bundle, "--server", place.url, "--data", few, "--hold-out", "auto")
    assert_fails(asked, DATA, "holds nothing out of these data")


def test_few_rows_are_split_where_held_out_data_are_needed(place: Place, tmp_path: Path) -> None:
    """A run without such an option trains on all of them, and cannot be given one later."""
    few = write(tmp_path / "few.jsonl", *map(pair, range(9)))
    out, plain = tmp_path / "out", tmp_path / "plain"
    done = run_edge(*place.train(out, data=few, keep="best"))
    assert done.code == 0, done.stderr
    assert "--keep best needs held-out data, and these are few: --hold-out 0.1" in done.stderr
    assert "held out: 1 of 9 rows" in done.stderr
    evaluate = ["evaluate", "--bundle", place.bundle, "--server", place.url, "--data", few, "--hold-out", "auto"]
    asked = run_edge(*evaluate, "--adapter", out, "--json")
    assert asked.code == 0, asked.stderr
    assert json.loads(asked.stdout)["examples"] == 1
    on = run_edge("resume", out, "--steps", 4, "--keep", "last")
    assert on.code == 0, on.stderr
    assert "held out: 1 of 9 rows" in on.stderr
    assert run_edge(*place.train(plain, data=few)).code == 0
    assert_fails(run_edge(*evaluate, "--adapter", plain), DATA, "holds nothing out of these data")
    assert_fails(run_edge("resume", plain, "--steps", 4, "--keep", "best"), USAGE, "began without")
    same = write(tmp_path / "same.jsonl", *[pair(1)] * 9)
    done = run_edge(*place.train(tmp_path / "c", data=same, patience=2))
    assert_fails(done, DATA, "two different rows", "--patience")
