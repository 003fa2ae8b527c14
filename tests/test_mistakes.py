"""Slips at the command line: numbers that cannot be meant, places that are taken, data over the server's limits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from families import VOCABULARY
from processes import run_edge
from serving import random_dataset, serving
from test_cli import Place, assert_fails
from tiny import TinyFactory

from dlora.cloud.commands.torch_start import check_device
from dlora.edge.commands.description import describe
from dlora.edge.files import locked
from dlora.edge.training.expected import total_steps
from dlora.protocol.errors import DataError, UsageError

BLOCKS = 3


@pytest.fixture(scope="module")
def place(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("slips")
    model = tiny(blocks=BLOCKS)
    data = directory / "good.jsonl"
    data.write_text((json.dumps({"prompt": "w1 w2 w3", "completion": " w4 w5"}) + "\n") * 4)
    with serving(model.base, max_tokens=70) as server:
        yield Place(model.bundle, data, server.url)


@pytest.mark.parametrize("option", [
    {"alpha": "nan"}, {"alpha": 0}, {"alpha": "inf"}, {"lr": "inf"}, {"steps": 10**12}, {"seed": 2**32},
    {"rank": 10**6}, {"threads": 10**6}, {"warmup": "inf"}, {"set": f"kill_revive.kill_every={10**10}"},
], ids=str)  # fmt: skip
def test_out_of_range_numbers_are_usage_errors(place: Place, tmp_path: Path, option: dict[str, object]) -> None:
    done = run_edge(*place.train(tmp_path / "out", **option))
    assert_fails(done, UsageError.exit_code, f"--{next(iter(option)).replace('_', '-')}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("epochs", [math.inf, 1e300])
def test_too_many_epochs_are_a_usage_error(epochs: float) -> None:
    with pytest.raises(UsageError, match="--epochs"):
        total_steps(random_dataset(VOCABULARY), epochs=epochs, steps=None, examples_a_step=4)


@pytest.mark.parametrize(("device", "gpus", "text"), [
    ("gpu", 1, "write cpu"), ("cuda:x", 1, "write cpu"), ("cuda", 0, "no CUDA device"), ("cuda:2", 2, "cuda:0"),
])  # fmt: skip
def test_missing_torch_device_is_a_usage_error(device: str, gpus: int, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        check_device(device, gpus)
    check_device("cpu", gpus)


def test_out_that_holds_something_else_is_refused(place: Place, tmp_path: Path) -> None:
    for name, said in (
        ("adapter_model.safetensors", "holds an adapter"), ("README.md", "not empty and holds no run"),
    ):  # fmt: skip
        out = tmp_path / name
        out.mkdir()
        (out / name).write_bytes(b"somebody's work")
        for more in ([], ["--resume"]):
            assert_fails(run_edge(*place.train(out), *more), UsageError.exit_code, said)
        assert [path.read_bytes() for path in out.iterdir()] == [b"somebody's work"]


def test_second_run_in_the_same_directory_is_refused(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with locked(out):
        assert_fails(run_edge(*place.train(out)), UsageError.exit_code, "another run", str(out))
    assert run_edge(*place.train(out)).code == 0


def test_partly_used_init_adapter_gives_a_warning(place: Place, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_edge(*place.train(first)).code == 0
    kept = place.train(second, init_adapter=first, active_fraction=0.3)
    done = run_edge(*kept)
    assert done.code == 0, done.stderr
    assert f"warning: {2 * (BLOCKS - 1)} of the {2 * BLOCKS} modules of --init-adapter" in done.stderr
    assert describe(first)["blocks"] == f"0-{BLOCKS - 1}"
    assert describe(second)["blocks"] == str(BLOCKS - 1)


def test_held_out_data_beyond_the_servers_limits_are_an_error(place: Place, tmp_path: Path) -> None:
    """As for training data: exit code 3, and what to do. The server takes 64 tokens a sequence, 70 a micro-batch."""
    long, many = tmp_path / "long.jsonl", tmp_path / "many.jsonl"
    long.write_text(json.dumps({"text": "w1 " * 80}))
    many.write_text((json.dumps({"text": "w1 " * 40}) + "\n") * 2)
    evaluate = ["evaluate", "--bundle", place.bundle, "--server", place.url, "--threads", 1, "--json", "--data"]
    assert_fails(run_edge(*evaluate, long), DataError.exit_code, "81 tokens, the limit is 64")
    done = run_edge(*evaluate, many)  # two micro-batches instead of one
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 2
    cut = run_edge(*evaluate, long, "--too-long", "truncate", "--max-length", 64)
    assert cut.code == 0, cut.stderr
    assert "data: long.jsonl (text), 1 example, 64 tokens, 63 labelled; 1 truncated (" in cut.stderr
    prompt = ["generate", "--bundle", place.bundle, "--server", place.url, "--prompt", "w1 " * 80]
    assert_fails(run_edge(*prompt), DataError.exit_code, "the prompt has")
