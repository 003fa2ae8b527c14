"""The best evaluation's weights are kept beside the last ones, saved where asked, and end a run that has no use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import save_tiny, tiny_model
from processes import Finished, run_edge
from safetensors.numpy import load_file
from serving import serving
from test_cli import Place, assert_fails

from dlora.cloud.base_model import BaseModel
from dlora.export.bundle import ExportSettings, export_bundle
from dlora.protocol.errors import UsageError

WEIGHTS = "adapter_model.safetensors"
# A learning rate with which a tiny model learns its four lines by heart, and unlearns all others.
OVERFITS: dict[str, object] = {"steps": 20, "lr": 0.05, "eval_every": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("held-out")
    save_tiny(directory / "model")
    export_bundle(ExportSettings(str(directory / "model"), directory / "bundle", rank=4, alpha=8.0))
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"w{n} w{n + 1} w{n + 2} w{n + 3}"}) + "\n" for n in range(4)))
    (directory / "held.jsonl").write_text(json.dumps({"text": "w1 w2 w60 w61 w7 w62"}) + "\n")
    with serving(BaseModel.from_model(tiny_model("llama"), "tiny")) as server:
        yield Place(directory / "bundle", data, server.url)


def train(place: Place, out: Path, **options: object) -> dict[str, Any]:
    done = run(place, out, **options)
    assert done.code == 0, done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr}


def run(place: Place, out: Path, *more: object, **options: object) -> Finished:
    held_out = place.data.with_name("held.jsonl")
    return run_edge(*place.train(out, **{"eval": held_out, **OVERFITS, **options}), *more, "--json")


def loss_of(place: Place, adapter: Path) -> float:
    done = run_edge(
        "evaluate", "--bundle", place.bundle, "--server", place.url, "--data", place.data.with_name("held.jsonl"),
        "--adapter", adapter, "--threads", 1, "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    return float(json.loads(done.stdout)["loss"])


@pytest.fixture(scope="module")
def last(place: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("last") / "out"
    return out, train(place, out)


def test_the_best_lies_beside_the_last(place: Place, last: tuple[Path, dict[str, Any]]) -> None:
    out, summary = last
    losses = {row["step"]: row["loss"] for row in summary["evaluations"]}
    assert sorted(losses) == list(range(0, 21, 2))
    assert summary["eval_loss_best"] == min(losses.values()) < losses[20], "it overfits, or this test shows nothing"
    assert losses[summary["best_step"]] == summary["eval_loss_best"]
    assert (out / WEIGHTS).read_bytes() != (out / "best" / WEIGHTS).read_bytes()
    assert loss_of(place, out) == pytest.approx(losses[20], abs=2e-3)
    assert loss_of(place, out / "best") == pytest.approx(summary["eval_loss_best"], abs=2e-3)


def test_the_best_is_saved_where_asked(place: Place, last: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Nothing else changes: the checkpoint is of the last step, so that the run can be made longer."""
    out = tmp_path / "out"
    summary = train(place, out, keep="best")
    assert summary["evaluations"] == last[1]["evaluations"]
    assert f"saved: the adapter of step {summary['best_step']}" in summary["stderr"]
    for name, tensor in load_file(last[0] / "best" / WEIGHTS).items():
        assert load_file(out / WEIGHTS)[name].tobytes() == tensor.tobytes()


def test_patience_ends_a_run(place: Place, last: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = train(place, out, keep="best", patience=2)
    assert summary["steps"] == summary["best_step"] + 4 < 20
    assert "2 evaluations in a row were no better" in summary["stderr"]
    shared = [row for row in last[1]["evaluations"] if row["step"] <= summary["steps"]]
    assert summary["evaluations"] == shared
    assert loss_of(place, out) == pytest.approx(summary["eval_loss_best"], abs=2e-3)
    again = run_edge("resume", out, "--json")
    assert again.code == 0, again.stderr
    assert "this run is finished" in again.stderr
    # Who has more patience goes on.
    on = run_edge("resume", out, "--patience", 100, "--json")
    assert on.code == 0, on.stderr
    assert json.loads(on.stdout)["steps"] == 20


def test_who_wants_the_best_is_evaluated_on_the_way(place: Place, tmp_path: Path) -> None:
    summary = train(place, tmp_path / "out", keep="best", eval_every=0)
    assert [row["step"] for row in summary["evaluations"]] == list(range(0, 21, 2))


@pytest.mark.parametrize("option", [{"keep": "best"}, {"patience": 3}, {"eval_every": 2}], ids=str)
def test_what_needs_held_out_data(place: Place, tmp_path: Path, option: dict[str, object]) -> None:
    done = run_edge(*place.train(tmp_path / "out", **option))
    assert_fails(done, UsageError.exit_code, "needs --eval")
    assert not (tmp_path / "out").exists()
