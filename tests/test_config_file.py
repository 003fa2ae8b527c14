"""Options from a file: what the command line says goes before the environment, and that before the file."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from processes import Finished, run_edge
from test_cli import Place, assert_fails, place  # noqa: F401

USAGE = 2
NEEDED = 'bundle = "b"\ndata = "d.jsonl"\nout = "o"\n'


def train(directory: Path, text: str, *options: object, **environment: str) -> Finished:
    (directory / "run.toml").write_text(text)
    return run_edge("train", "--config", directory / "run.toml", *options, **environment)


def resolved(directory: Path, text: str, *options: object, **environment: str) -> dict[str, Any]:
    """What each option that is no default came to."""
    written = directory / "written.toml"
    written.unlink(missing_ok=True)
    done = train(directory, text, *options, "--write-config", written, **environment)
    assert done.code == 0, done.stderr
    return tomllib.loads(written.read_text())


def test_the_nearest_word_counts(tmp_path: Path) -> None:
    text = NEEDED + "lr = 1e-3\nrank = 8\nbatch_size = 2\nkr-spread = false\n"
    assert resolved(tmp_path, text) == {
        "bundle": "b", "data": "d.jsonl", "out": "o", "lr": 1e-3, "rank": 8, "batch-size": 2, "kr-spread": False,
    }  # fmt: skip
    of_all = resolved(tmp_path, text, "--lr", 3e-3, DLORA_EDGE_LR="2e-3", DLORA_EDGE_RANK="4", DLORA_EDGE_EPOCHS="2")
    assert (of_all["lr"], of_all["rank"], of_all["batch-size"], of_all["epochs"]) == (3e-3, 4, 2, 2.0)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    text = NEEDED + (
        'pause-when = ["battery<20", "temp>70"]\ncolumns = "text=a \\"b\\" é"\neval = "e"\nexact = true\nseed = 0\n'
    )
    first = resolved(tmp_path, text)
    assert first["pause-when"] == ["battery<20", "temp>70"]
    assert first["columns"] == 'text=a "b" é'
    assert resolved(tmp_path, (tmp_path / "written.toml").read_text()) == first


def test_the_file_names_every_option(tmp_path: Path) -> None:
    resolved(tmp_path, NEEDED)
    named = set(re.findall(r"^(?:# )?([\w-]+) =", (tmp_path / "written.toml").read_text(), re.M))
    shown = set(re.findall(r"^│ [* ]? *--([\w-]+)", run_edge("train", "--help", COLUMNS="200").stdout, re.M))
    assert shown - named == {"config", "write-config", "help"}


def test_a_run_is_the_same_from_a_file(place: Place, tmp_path: Path) -> None:  # noqa: F811
    words = place.train(tmp_path / "by-options")
    options = dict(zip(map(str, words[1::2]), words[2::2], strict=True)) | {"--out": tmp_path / "by-file"}
    numbers = ("--steps", "--batch-size", "--threads", "--seed")
    lines = [
        f"{name[2:]} = {value if name in numbers else json.dumps(str(value))}\n" for name, value in options.items()
    ]
    by_file, by_options = train(tmp_path, "".join(lines)), run_edge(*words)
    assert by_file.code == by_options.code == 0, by_file.stderr
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("by-file", "by-options")]
    assert weights[0] == weights[1]
    assert run_edge("resume", tmp_path / "by-file", "--steps", 3).code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr = ", "is not valid TOML: "),
        ("learning-rate = 1", "'learning-rate' is no option of train; you mean lr"),
        ("eval-dat = 'x'", "'eval-dat' is no option of train; is it eval-data?"),
        ("[train]\nlr = 1", "'train' is no option of train"),
        ("lr = 1\n[data]\nx = 1", "'data' is a table; write options one below the other"),
        ("eval = 'a'\neval-data = 'b'", "says 'eval-data' twice"),
        ("config = 'x'", "'config' is no option of train"),
        ("\udcff", "is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(text.encode(errors="surrogateescape"))
    assert_fails(run_edge("train", "--config", tmp_path / "run.toml"), USAGE, words)


def test_values_and_files_that_cannot_be(tmp_path: Path) -> None:
    assert_fails(run_edge("train", "--config", tmp_path / "none.toml"), USAGE, "cannot be read: No such file")
    wrong = train(tmp_path, NEEDED + 'lr = "much"\n')
    assert wrong.code == USAGE
    assert "--lr" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    there = train(tmp_path, NEEDED, "--write-config", tmp_path / "run.toml")
    assert_fails(there, USAGE, "is there already")
