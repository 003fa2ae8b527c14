"""The best evaluation's weights are kept beside the last ones, saved where asked, and end a run that has no use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Finished, run_edge
from safetensors.numpy import load_file
from serving import serving
from test_cli import Place, assert_fails
from tiny import TinyFactory

from dlora.edge.data.examples import Dataset
from dlora.edge.settings import Settings
from dlora.edge.training.resolve import resolve
from dlora.protocol.errors import UsageError
from dlora.protocol.manifest import load_manifest

WEIGHTS = "adapter_model.safetensors"
OVERFITS: dict[str, object] = {"steps": 20, "lr": 0.1, "schedule": "constant", "alpha": 32, "eval_every": 2}


@pytest.fixture(scope="module")
def place(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("held-out")
    model = tiny()
    data = directory / "data.jsonl"
    # That an answer is one word long is soon learnt, and helps; then what the words are, which are others there.
    rows = [{"prompt": f"w{n} w{n + 1}", "completion": f" w{n + 2}"} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "held.jsonl").write_text(json.dumps({"prompt": "w1 w2", "completion": " w60"}) + "\n")
    with serving(model.base) as server:
        yield Place(model.bundle, data, server.url)


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


def test_best_adapter_is_saved_beside_the_last(place: Place, last: tuple[Path, dict[str, Any]]) -> None:
    out, summary = last
    losses = {row["step"]: row["loss"] for row in summary["evaluations"]}
    assert sorted(losses) == list(range(0, 21, 2))
    assert summary["eval_loss_best"] == min(losses.values()) < losses[20], "it overfits, or this test shows nothing"
    assert losses[summary["best_step"]] == summary["eval_loss_best"]
    assert (out / WEIGHTS).read_bytes() != (out / "best" / WEIGHTS).read_bytes()
    assert loss_of(place, out) == pytest.approx(losses[20], abs=2e-3)
    assert loss_of(place, out / "best") == pytest.approx(summary["eval_loss_best"], abs=2e-3)


def test_keep_best_saves_the_best_adapter(place: Place, last: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
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
    ended = summary["steps"]
    assert f"--patience ended it at step {ended} of 20, and a larger one goes on" in again.stderr
    longer = run_edge("resume", out, "--steps", 40)
    assert_fails(longer, UsageError.exit_code, f"at step {ended} of 20", "with a larger --patience")
    # Who has more patience goes on.
    on = run_edge("resume", out, "--patience", 100, "--json")
    assert on.code == 0, on.stderr
    assert json.loads(on.stdout)["steps"] == 20


def test_evaluations_change_no_bit_of_the_training(
    place: Place, last: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run_edge(*place.train(out, **{**OVERFITS, "eval_every": None}))
    assert done.code == 0, done.stderr
    assert (out / WEIGHTS).read_bytes() == (last[0] / WEIGHTS).read_bytes()


def test_where_five_evaluations_are_cheap_the_held_out_loss_is_a_curve(place: Place, tmp_path: Path) -> None:
    """5 evaluations * 3 tokens * 1/2 against 20 steps * 6 tokens * 1/10; and as many as were announced."""
    summary = train(place, tmp_path / "out", eval_every=None)
    assert [row["step"] for row in summary["evaluations"]] == [0, 5, 10, 15, 20]
    assert " for 5 evaluations will cross" in summary["stderr"]


COSTLY: dict[str, tuple[dict[str, Any], int]] = {
    "nobody says": ({}, 5), "as often as it is asked": ({"eval_every": 3}, 3),
    "not on the way": ({"eval_every": 0}, 0), "for the best": ({"keep": "best"}, 2),
    "a short run": ({"steps": 12}, 0), "the wire of training is narrower": ({"wire_dtype": "int8"}, 0),
    "that wire, and a longer run": ({"wire_dtype": "int8", "steps": 26}, 7),
    "larger micro-batches": ({"steps": 6, "batch_size": 4}, 0),
    "a shorter run with larger ones": ({"steps": 11, "batch_size": 4}, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTLY)
def test_evaluations_that_nobody_asked_for_take_less_than_a_tenth_of_the_run(place: Place, name: str) -> None:
    options, every = COSTLY[name]
    manifest = load_manifest(place.bundle)
    settings = Settings.of(**{"kind": "lora", "server": place.url, "steps": 20, "batch_size": 2, **options})
    rows = [([n, n + 1, n + 2], [1]) for n in range(4)]
    loaded = [Dataset.of(rows), Dataset.of(rows[:1])]
    found, _ = resolve(settings, manifest, None, loaded)
    assert found.evaluate_every == every


@pytest.mark.parametrize("option", [{"keep": "best"}, {"patience": 3}, {"eval_every": 2}], ids=str)
def test_options_that_need_held_out_data_are_refused_without(
    place: Place, tmp_path: Path, option: dict[str, object]
) -> None:
    done = run_edge(*place.train(tmp_path / "out", hold_out=0, **option))
    assert_fails(done, UsageError.exit_code, "needs --eval")
    assert not (tmp_path / "out").exists()


def test_run_that_patience_ended_at_its_last_step_can_be_made_longer(place: Place, tmp_path: Path) -> None:
    """The part that comes on top has patience of its own."""
    out = tmp_path / "out"
    first = train(place, out, patience=100)
    longer = run_edge("resume", out, "--steps", 24, "--patience", 2, "--json")
    assert longer.code == 0, longer.stderr
    assert first["steps"] == 20 < json.loads(longer.stdout)["steps"]


def test_evaluations_on_other_data_are_not_compared(
    place: Place, last: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """What was best on the old data says nothing about the new."""
    out = tmp_path / "out"
    train(place, out, steps=10)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "w70 w71 w72 w73"}) + "\n")
    done = run(place, out, "--resume", steps=10, keep="best", eval=other)
    assert done.code == 0, done.stderr
    assert "evaluations of other held-out data are not counted" in done.stderr


def test_keep_best_ignores_weights_of_undone_steps(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(place, out, steps=20)
    row = json.loads((out / "best" / "evaluation.json").read_text())
    (out / "best" / "evaluation.json").write_text(json.dumps({**row, "step": 1}))
    (out / "summary.json").unlink()
    last = (out / WEIGHTS).read_bytes()
    again = run(place, out, "--resume", keep="best")
    assert again.code == 0, again.stderr
    assert f"the weights of step {row['step']}, the best evaluation, are gone: the last are kept" in again.stderr
    assert (out / WEIGHTS).read_bytes() == last
