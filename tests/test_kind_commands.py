"""Runs of the other kinds by the real commands: what they choose, write down, go on with, and refuse."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import one_in
from processes import Finished, finish, run_edge, start_edge
from runs import settings_in
from safetensors.numpy import load_file
from serving import serving
from test_cli import assert_fails
from test_resume import SAVE_EVERY, Place, assert_same_run, rows, wait_for_lines
from tiny import TinyFactory

from dlora.edge.adapters.parts import PARTS_NAME
from dlora.edge.adapters.peft import load_adapter
from dlora.edge.run.run_file import load_run_file
from dlora.edge.training.checkpoint import list_checkpoints
from dlora.edge.training.defaults import DEFAULTS

BLOCKS = 4
RANK = 4
BOTTLENECK = ("--kind", "bottleneck", "--rank", RANK)


@pytest.fixture(scope="module")
def place(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("kinds")
    model = tiny(blocks=BLOCKS)
    rng = np.random.default_rng(2)
    words = [[f"w{n}" for n in rng.integers(0, 80, int(rng.integers(5, 11)))] for _ in range(10)]
    records = [{"prompt": " ".join([*line[:3], "w88 w89"]), "completion": " " + " ".join(line[3:])} for line in words]
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    with serving(model.base) as server:
        yield Place(model.bundle, data, server.url)


def without_kind(words: list[object]) -> list[object]:
    """``dlora-edge train`` as a user types it."""
    return [word for word in words if word not in ("--kind", "lora")]


def summary(done: Finished) -> dict[str, Any]:
    assert done.code == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def whole(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    done = run_edge(*place.train(out, *BOTTLENECK, "--eval", place.data, "--json"))
    assert done.code == 0, done.stderr
    assert "adapters: bottleneck, rank 4" in done.stderr
    assert "activated LoRA" in done.stderr
    assert "cannot merge" in done.stderr
    assert json.loads(done.stdout)["eval_loss_after"] < json.loads(done.stdout)["eval_loss_before"]
    return out


def test_what_was_left_open_is_chosen_once_and_written_down(whole: Path) -> None:
    settings = settings_in(whole)
    assert (settings.kind, settings.rank, settings.alpha) == ("bottleneck", RANK, float(RANK))
    assert (settings.target_modules, settings.blocks) == ("all-linear", "0-3")
    assert (settings.active_from, settings.wire_dtype) == ("answer", "int8")
    assert settings.weight_decay == DEFAULTS["bottleneck"].weight_decay > 0
    config = json.loads((whole / "adapter_config.json").read_text())
    assert len(config["alora_invocation_tokens"]) == 1
    _, checkpoint = list_checkpoints(whole / "checkpoints")[-1]
    kept = [tensor.dtype.name for name, tensor in load_file(checkpoint).items() if "adapter_state" in name]
    assert sorted(kept) == ["int8"] * 4 * BLOCKS + ["uint8"] * 2 * 4 * BLOCKS, "exponents, and A and B as they crossed"


@pytest.mark.parametrize("at", one_in(2, ["after a checkpoint", "before the first"]))
def test_killed_run_goes_on_to_the_same_bits(place: Place, whole: Path, at: str, tmp_path: Path) -> None:
    """Before the first checkpoint it begins anew, with a basis of its own that is the same."""
    out = tmp_path / "out"
    process = start_edge(*place.train(out, *BOTTLENECK, "--eval", place.data))
    wanted = SAVE_EVERY + 3 if at == "after a checkpoint" else 2
    metrics = out / "metrics.jsonl"
    wait_for_lines(metrics, wanted)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert run_edge("resume", out).code == 0
    assert_same_run(out, whole)
    assert load_adapter(out).parts is not None


def test_run_keeps_its_invocation_with_other_held_out_data(place: Place, whole: Path, tmp_path: Path) -> None:
    """These would have had another one chosen: an answer contains it."""
    out, other = tmp_path / "out", tmp_path / "other.jsonl"
    shutil.copytree(whole, out)
    other.write_text(json.dumps({"prompt": "w1 w2 w88 w89", "completion": " w3 w89 w4"}) + "\n")
    done = run_edge(*place.train(out, *BOTTLENECK, "--eval", other, "--resume"))
    assert done.code == 0, done.stderr
    assert "1 of 1 examples" in done.stderr
    assert load_run_file(out).invocation == load_run_file(whole).invocation == load_adapter(out).invocation


def test_saved_adapter_evaluates_and_answers(place: Place, whole: Path) -> None:
    where = ("--bundle", place.bundle, "--server", place.url, "--adapter", whole)
    after = json.loads((whole / "summary.json").read_text())["eval_loss_after"]
    for wire_dtype, tolerance in (("fp16", 1e-5), ("int8", 0.1)):
        done = run_edge("evaluate", *where, "--data", place.data, "--wire-dtype", wire_dtype, "--json")
        assert summary(done)["loss"] == pytest.approx(after, abs=tolerance)
    assert run_edge("generate", *where, "--prompt", "w1 w2 w88 w89", "--max-new-tokens", 3).code == 0
    assert "bottleneck" in run_edge("info", whole).stdout


def test_run_that_starts_from_it_takes_its_kind_rank_and_blocks(place: Place, whole: Path, tmp_path: Path) -> None:
    options = ("--init-adapter", whole, "--eval", place.data, "--steps", 2, "--json")
    done = run_edge(*without_kind(place.train(tmp_path / "on", *options)))
    before = json.loads((whole / "summary.json").read_text())["eval_loss_after"]
    assert summary(done)["eval_loss_before"] == pytest.approx(before, abs=1e-5)
    settings = settings_in(tmp_path / "on")
    assert (settings.kind, settings.rank, settings.blocks) == ("bottleneck", RANK, "0-3")
    assert settings.weight_decay == 0.0  # it would unlearn what the adapter knows
    assert (settings.basis, settings_in(whole).basis) == (None, "data")
    done = run_edge(*without_kind(place.train(tmp_path / "no", *options, "--basis", "weights")))
    assert_fails(done, 2, "--init-adapter has its basis")
    assert load_adapter(tmp_path / "on").invocation == load_adapter(whole).invocation


def test_run_starts_from_no_lora_but_as_a_lora(place: Place, whole: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    assert run_edge(*place.train(lora, "--steps", 1)).code == 0
    everywhere = (*BOTTLENECK, "--active-from", "start")
    for adapter, said in ((lora, "--kind lora"), (whole, "--active-from answer")):
        done = run_edge(*place.train(tmp_path / "no", *everywhere, "--init-adapter", adapter, "--steps", 1))
        assert_fails(done, 10, said)
    as_lora = ("--kind", "lora", "--rank", RANK, "--target-modules", "all-linear", "--active-from", "answer")
    as_lora += ("--steps", 1)
    done = run_edge(*place.train(tmp_path / "yes", *as_lora, "--init-adapter", whole, "--eval", place.data, "--json"))
    before = json.loads((whole / "summary.json").read_text())["eval_loss_after"]
    assert summary(done)["eval_loss_before"] == pytest.approx(before, abs=1e-3)
    assert not (tmp_path / "yes" / PARTS_NAME).exists()


def test_data_without_answers_are_trained_everywhere_or_refused(place: Place, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "w1 w2 w3"}\n{"text": "w4 w5"}\n')
    words = place.train(tmp_path / "out", *BOTTLENECK, "--steps", 1)
    options = [texts if word == place.data else word for word in words]
    assert run_edge(*options).code == 0
    assert settings_in(tmp_path / "out").active_from == "start"
    other = [tmp_path / "other" if word == tmp_path / "out" else word for word in options]
    assert_fails(run_edge(*other, "--active-from", "answer"), 2, "--active-from start")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--wire-dtype", "int4"), "begin with one of int8, fp16, fp32"),
        (("--wire-dtype", "int8,nothing=fp16"), "ROLE=DTYPE"),
        (("--blocks", "spread:0"), "write blocks as"),
        (("--kind", "bottleneck", "--rank", "4000"), "no wider than that"),
        (("--kind", "lora", "--basis", "data", "--set", "adapter.basis_steps=2"), "--kind lora has no"),
        (("--kind", "bottleneck", "--basis", "random", "--set", "adapter.basis_steps=2"), "takes no data"),
    ],
)
def test_what_cannot_be_is_one_line(place: Place, options: tuple[str, ...], text: str, tmp_path: Path) -> None:
    assert_fails(run_edge(*place.train(tmp_path / "out", *options)), 2, text)
    assert not (tmp_path / "out").exists()


def test_blocks_are_chosen_by_number(place: Place, tmp_path: Path) -> None:
    for blocks, chosen in (("spread:2", "2-3"), ("last:1", "3"), ("spread:9", "0-3"), ("all", "0-3")):
        out = tmp_path / blocks
        assert run_edge(*place.train(out, "--steps", 1, "--blocks", blocks)).code == 0
        assert settings_in(out).blocks == chosen
        assert {row["units"] for row in rows(out)} == {"1" * len(range(int(chosen[0]), int(chosen[-1]) + 1))}


def test_rate_that_nobody_named_is_found_once_and_kept(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = without_kind(place.train(out, "--steps", 4))
    at = words.index("--lr")
    words = (*words[:at], *words[at + 2 :])
    done = run_edge(*words)
    assert done.code == 0, done.stderr
    settings = settings_in(out)
    assert (settings.kind, settings.active_from, settings.wire_dtype) == ("bottleneck", "answer", "int8")
    assert settings.rank == 16, "the tiny model's width: less than 64"
    found = settings.lr
    assert found is not None
    assert f"learning rate {found:g}: the first update was tried in " in done.stderr
    assert max(row["learning_rate"] for row in rows(out)) == found
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["set_up_bytes_up"] > first["bytes_up"], "the search is counted before the first step"
    for resume in (("resume", out, "--steps", 6), (*words[: words.index("--steps")], "--steps", 8, "--resume")):
        done = run_edge(*resume)
        assert (done.code, "the first update was tried" in done.stderr) == (0, False), done.stderr
        assert settings_in(out).lr == found


def test_the_map_has_the_numbers_of_the_blocks(place: Place, tmp_path: Path) -> None:
    kills = ("--active-fraction", 0.6, "--kr-score", "random", "--steps", 12)
    kills += ("--set", "kill_revive.kill_every=1", "--set", "kill_revive.revive_every=2")
    kills += ("--set", "kill_revive.probation=1")
    done = run_edge(*place.train(tmp_path / "out", *BOTTLENECK, "--blocks", "1-3", *kills))
    assert done.code == 0, done.stderr
    shown = [line.split()[:2] for line in done.stderr.splitlines() if line.strip().startswith("block ")]
    assert shown == [["block", "3"], ["block", "2"], ["block", "1"]]


def test_static_units_are_spread_by_default(place: Place, tmp_path: Path) -> None:
    static = ("--steps", 2, "--kind", "lora", "--kr-score", "static", "--active-fraction")
    for fraction, units in ((0.5, "0011"), (0.25, "0001"), (1, "1111")):
        out = tmp_path / units
        assert run_edge(*place.train(out, *static, fraction)).code == 0
        assert {row["units"] for row in rows(out)} == {units}


def test_a_run_from_a_bottleneck_trains_its_modules_and_makes_no_basis(place: Place, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    makes = "first, the server makes A and B"
    assert makes in run_edge(*place.train(first, *BOTTLENECK, "--target-modules", "q_proj", "--steps", 1)).stderr
    done = run_edge(*without_kind(place.train(again, "--init-adapter", first, "--steps", 1)))
    assert makes not in done.stderr
    assert load_adapter(again).modules.keys() == load_adapter(first).modules.keys()
