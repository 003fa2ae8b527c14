"""Runs in passes by the real commands: what they say and write down, go on with, and refuse."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from processes import finish, run_edge, start_edge
from test_cli import assert_fails
from test_kind_commands import BOTTLENECK, summary
from test_kind_commands import place as place_of_answers
from test_resume import KILLING, SAVE_EVERY, Place, assert_same_run, wait_for_lines

from dlora.edge.adapters.about import about_adapter
from dlora.edge.run.directory import KEPT_READS
from dlora.protocol.adapter_record import TrainingRecord

place = place_of_answers
EPOCH = 4  # steps
WAYS = {"default": BOTTLENECK, "kill and revive": (*BOTTLENECK, *KILLING), "lora": ("--kind", "lora")}


@pytest.fixture(scope="module")
def wholes(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nothing interrupted."""
    found = {}
    for name, way in WAYS.items():
        found[name] = tmp_path_factory.mktemp("whole")
        done = run_edge(*place.train(found[name], *way, "--passes", "2,2", "--eval", place.data))
        assert done.code == 0, done.stderr
        assert "held-out loss live, as PEFT uses the saved adapter: " in done.stderr
    return found


def training_of(out: Path) -> TrainingRecord:
    training = about_adapter(out).training
    assert training is not None
    return training


def round_trips(out: Path) -> list[int]:
    return [json.loads(line)["round_trips"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("way", WAYS)
def test_a_step_takes_five_round_trips(wholes: dict[str, Path], way: str) -> None:
    for line in (wholes[way] / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if way != "default" or row["step"] < EPOCH:
            assert row["round_trips"] == (5 if row["live_units"] > 1 else 3)


def test_from_the_second_epoch_on_it_takes_four_and_no_bit_depends_on_what_is_kept(
    place: Place, wholes: dict[str, Path], tmp_path: Path
) -> None:
    options = (*BOTTLENECK, "--passes", "2,2", "--eval", place.data)
    done = run_edge(*place.train(tmp_path / "nothing", *options, "--cache-mb", 0))
    assert done.code == 0, done.stderr
    assert "what adapters read in the base pass is not kept: --cache-mb has no room for " in done.stderr
    assert set(round_trips(tmp_path / "nothing")) == {5}
    assert_same_run(tmp_path / "nothing", wholes["default"])
    later = round_trips(wholes["default"])[EPOCH:]
    assert set(later) <= {4, 5}
    assert later.count(4) > len(later) / 2  # the server may round other company otherwise
    assert not (wholes["default"] / KEPT_READS).exists()


def test_what_is_kept_is_encrypted_with_the_key_and_survives_a_kill(
    place: Place, wholes: dict[str, Path], tmp_path: Path
) -> None:
    out, key, other = tmp_path / "out", tmp_path / "key", tmp_path / "other"
    key.write_text("ab" * 32)
    other.write_text("cd" * 32)
    options = (*BOTTLENECK, "--passes", "2,2", "--eval", place.data, "--cache-key-file", key)
    run = start_edge(*place.train(out, *options))
    wait_for_lines(out / "metrics.jsonl", SAVE_EVERY + 3)
    run.send_signal(signal.SIGKILL)
    finish(run)
    kept = (out / KEPT_READS).read_bytes()
    assert_fails(run_edge("resume", out, "--cache-key-file", other), 10, "is encrypted with another key")
    assert (out / KEPT_READS).read_bytes() == kept
    done = run_edge("resume", out)
    assert done.code == 0, done.stderr
    assert 4 in round_trips(out)
    assert_same_run(out, wholes["default"])


def test_a_run_that_is_recorded_keeps_nothing(place: Place, tmp_path: Path) -> None:
    options = (*BOTTLENECK, "--passes", "2,2", "--steps", 10, "--record", tmp_path / "record")
    done = run_edge(*place.train(tmp_path / "out", *options))
    assert done.code == 0, done.stderr
    assert "base pass" not in done.stderr
    assert set(round_trips(tmp_path / "out")) == {5}


def test_a_run_that_is_made_longer_keeps_by_its_own_part(place: Place, tmp_path: Path) -> None:
    """Two epochs and two more, of which each second one waits less; and one epoch more, which keeps nothing."""
    done = run_edge(*place.train(tmp_path, *BOTTLENECK, "--passes", "2,2", "--steps", 2 * EPOCH))
    assert done.code == 0, done.stderr
    done = run_edge("resume", tmp_path, "--steps", 4 * EPOCH)
    assert done.code == 0, done.stderr
    done = run_edge("resume", tmp_path, "--steps", 5 * EPOCH)
    assert done.code == 0, done.stderr
    epochs = [round_trips(tmp_path)[step : step + EPOCH] for step in range(0, 5 * EPOCH, EPOCH)]
    assert [4 in of_epoch for of_epoch in epochs] == [False, True, False, True, False]
    assert not (tmp_path / KEPT_READS).exists()


def test_nothing_is_kept_of_a_run_in_live(place: Place, tmp_path: Path) -> None:
    done = run_edge(*place.train(tmp_path, *BOTTLENECK, "--cache-mb", 10))
    assert_fails(done, 2, "--cache-mb needs --device-blocks, or --passes 2,2, with which something is kept here")


@pytest.mark.parametrize("way", WAYS)
def test_both_losses_are_written_down(place: Place, wholes: dict[str, Path], way: str) -> None:
    found, training = json.loads((wholes[way] / "summary.json").read_text()), training_of(wholes[way])
    assert found["eval_loss_after"] < found["eval_loss_before"]
    assert training.recipe["passes"] == "2,2"
    assert (training.eval_loss_after, training.eval_loss_live) == (found["eval_loss_after"], found["eval_loss_live"])
    assert found["eval_loss_live"] != found["eval_loss_after"]
    where = ("--bundle", place.bundle, "--server", place.url, "--adapter", wholes[way], "--data", place.data)
    evaluated = summary(run_edge("evaluate", *where, "--json"))["loss"]
    assert evaluated == pytest.approx(found["eval_loss_live"], abs=1e-5)


def test_the_best_adapter_is_evaluated_live_where_it_is_kept(place: Place, tmp_path: Path) -> None:
    """A rate that is too high: the last weights are not the best."""
    options = ("--eval", place.data, "--eval-every", 5, "--lr", 0.5, "--keep", "best", "--passes", "1,1", "--json")
    found = summary(run_edge(*place.train(tmp_path, *BOTTLENECK, *options)))
    assert found["saved_step"] < found["steps"]
    training = training_of(tmp_path)
    assert (training.steps, training.eval_loss_live) == (found["saved_step"], found["eval_loss_live"])
    where = ("--bundle", place.bundle, "--server", place.url, "--adapter", tmp_path, "--data", place.data)
    assert summary(run_edge("evaluate", *where, "--json"))["loss"] == pytest.approx(found["eval_loss_live"], abs=1e-5)


def test_an_adapter_that_is_worse_live_says_so(place: Place, tmp_path: Path) -> None:
    """A rate that is too high for one pass, which leaves out what groups do to each other."""
    options = ("--eval", place.data, "--steps", 20, "--lr", 0.5, "--keep", "last", "--passes", "1,1", "--json")
    done = run_edge(*place.train(tmp_path, *BOTTLENECK, *options))
    found = summary(done)
    assert found["eval_loss_live"] > found["eval_loss_after"] + 0.008
    assert found["is_worse_live"]
    assert training_of(tmp_path).is_worse_live
    assert "it is worse where it is used so; train with --passes live, or more passes" in done.stderr
    assert f"{found['eval_loss_live']:.4f}, which is worse |" in (tmp_path / "README.md").read_text()


def test_without_held_out_data_nobody_knows_the_live_loss(place: Place, tmp_path: Path) -> None:
    done = run_edge(*place.train(tmp_path, *BOTTLENECK, "--steps", 1, "--hold-out", 0, "--passes", "1,1", "--json"))
    assert (summary(done)["eval_loss_live"], summary(done)["is_worse_live"]) == (None, None)
    assert "without held-out data nobody knows what the adapter is worth live" in done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    place: Place, wholes: dict[str, Path], tmp_path: Path, way: str
) -> None:
    run = start_edge(*place.train(tmp_path, *WAYS[way], "--passes", "2,2", "--eval", place.data))
    wait_for_lines(tmp_path / "metrics.jsonl", SAVE_EVERY + 3)
    run.send_signal(signal.SIGKILL)
    finish(run)
    done = run_edge("resume", tmp_path)
    assert done.code == 0, done.stderr
    assert_same_run(tmp_path, wholes[way])
    assert training_of(tmp_path).eval_loss_live == training_of(wholes[way]).eval_loss_live


def test_an_adapter_is_used_live_or_in_its_own_passes(place: Place, wholes: dict[str, Path], tmp_path: Path) -> None:
    def start_from(passes: str) -> list[object]:
        out = tmp_path / passes
        return [*place.train(out, *BOTTLENECK), "--init-adapter", wholes["default"], "--passes", passes, "--steps", 1]

    for passes in ("1,1", "3,2"):
        assert_fails(run_edge(*start_from(passes)), 10, "was trained in passes 2,2; give --passes live, or --passes")
    for passes in ("live", "2,2"):
        done = run_edge(*start_from(passes))
        assert done.code == 0, done.stderr


def test_passes_are_those_of_the_run(place: Place, wholes: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(wholes["default"], out)
    done = run_edge(*place.train(out, *BOTTLENECK, "--passes", "live", "--steps", 50, "--resume"))
    assert_fails(done, 10, "has --passes 2,2, not live")
    for wrong in ("2", "0,1", "5,1", "some"):
        assert_fails(run_edge(*place.train(tmp_path / "no", "--passes", wrong)), 2, "--passes")


@pytest.mark.parametrize("passes", ["live", "2,2"])
def test_micro_batches_under_way_together_change_no_bit(place: Place, tmp_path: Path, passes: str) -> None:
    """One after the other; all of a step at once, killed in the midst of it; and the rest two at a time."""
    options = (*BOTTLENECK, "--passes", passes, "--grad-accum", 3, "--batch-size", 2, "--eval", place.data)
    done = run_edge(*place.train(tmp_path / "one", *options, "--window", 1))
    assert done.code == 0, done.stderr
    run = start_edge(*place.train(tmp_path / "all", *options))
    wait_for_lines(tmp_path / "all" / "metrics.jsonl", SAVE_EVERY + 3)
    run.send_signal(signal.SIGKILL)
    finish(run)
    done = run_edge("resume", tmp_path / "all", "--window", 2)
    assert done.code == 0, done.stderr
    assert_same_run(tmp_path / "all", tmp_path / "one")
    assert_fails(run_edge(*place.train(tmp_path / "no", "--window", 17)), 2, "--window")
