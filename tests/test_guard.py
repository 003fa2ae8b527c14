"""A run that makes the model worse says so, keeps what was best, ends where that was asked for, and has a red page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Finished, run_edge
from runs import write_run
from safetensors.numpy import load_file
from serving import serving
from test_cli import Place, assert_fails
from tiny import TinyFactory

from dlora.edge.report.page import run_page
from dlora.edge.run.guard import MOST_ABOVE, STEPS_OF_A_MEAN, Guard, TrainingLosses, held_out_worsening
from dlora.edge.training.checkpoint import list_checkpoints
from dlora.protocol.errors import WorseError

WEIGHTS = "adapter_model.safetensors"
STEPS = 24
# A hundred times the rate that learns these data.
HOT: dict[str, object] = {"steps": STEPS, "lr": 1.0, "schedule": "constant", "warmup": 0, "alpha": 32}


@pytest.fixture(scope="module")
def place(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("guard")
    model = tiny(initializer_range=0.5)
    data = directory / "data.jsonl"
    rows = [{"prompt": f"w{n}", "completion": f" w{20 + n} w{40 + n} w{20 + n} w{40 + n}"} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    with serving(model.base) as server:
        yield Place(model.bundle, data, server.url)


@pytest.fixture(scope="module")
def learned(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that has learnt the data, which a run can begin with and lose."""
    out = tmp_path_factory.mktemp("guard") / "learned"
    done = run_edge(*place.train(out, steps=80, lr=0.02, alpha=32, **held_out(place)), "--json")
    assert done.code == 0, done.stderr
    assert summary_of(done)["eval_loss_after"] < 0.6 * summary_of(done)["eval_loss_before"]
    return out


def run(place: Place, out: Path, *more: object, **options: object) -> Finished:
    return run_edge(*place.train(out, **{**HOT, **options}), *more, "--json")


def held_out(place: Place) -> dict[str, object]:
    return {"eval": place.data.with_name("held.jsonl"), "eval_every": 4}


def weights(adapter: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(adapter / WEIGHTS).items()}


def summary_of(done: Finished) -> dict[str, Any]:
    return dict(json.loads(done.stdout))


def test_a_worse_run_says_so_and_keeps_the_best(place: Place, learned: Path, tmp_path: Path) -> None:
    """The first evaluation is the best: what is saved changes nothing."""
    out = tmp_path / "out"
    done = run(place, out, init_adapter=learned, **held_out(place))
    assert done.code == 0, done.stderr
    found = summary_of(done)
    assert found["eval_loss_after"] > found["eval_loss_before"] == found["eval_loss_best"]
    assert (found["is_worse"], found["saved_step"], found["keep"]) == (True, 0, "auto")
    warnings = [line for line in done.stderr.splitlines() if "worse than before: held-out loss" in line]
    assert len(warnings) == 2, "once while it ran, and at its end"
    assert all(f"{found['eval_loss_before']:.4f} before training; try a tenth" in line for line in warnings)
    assert warnings[-1] == f"warning: worse than before: held-out loss {found['eval_loss_after']:.4f}, " + (
        f"{found['eval_loss_before']:.4f} before training; try a tenth of the learning rate, --lr 0.1, or more data"
    )
    assert weights(out) == weights(learned)
    page = (out / "report.html").read_text()
    assert '<p class="worse">Worse than before: held-out loss' in page
    assert "Saved is what the run began with." in page
    assert '<div class="card bad"><dt>held-out loss</dt>' in page


def test_a_user_who_wants_the_last_gets_it(place: Place, learned: Path, tmp_path: Path) -> None:
    done = run(place, tmp_path / "out", keep="last", init_adapter=learned, **held_out(place))
    found = summary_of(done)
    assert (found["is_worse"], found["saved_step"]) == (True, STEPS)
    assert "worse than before" in done.stderr
    assert weights(tmp_path / "out") != weights(learned)


def test_a_worse_run_ends_where_that_is_asked_for(place: Place, learned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(place, out, on_worse="stop", init_adapter=learned, **held_out(place))
    found = summary_of(done)
    assert (found["steps"], found["is_worse"], found["saved_step"]) == (4, True, 0)
    assert_fails(done, WorseError.exit_code, "made the model worse by step 4; saved: the adapter that it began with")
    assert "ended at step 4, for --on-worse stop: held-out loss" in done.stderr
    assert [step for step, _ in list_checkpoints(out / "checkpoints")] == [4]
    again = run_edge("resume", out, "--json")
    assert_fails(again, WorseError.exit_code, "made the model worse by step 4")
    assert f"--on-worse stop ended it at step 4 of {STEPS}, and --on-worse warn goes on" in again.stderr
    path = out / "summary.json"
    for lost in ("is_worse", "saved_step", "steps"):  # by whoever had it in hand: it is summed up anew
        path.write_text(json.dumps({key: value for key, value in found.items() if key != lost}))
        assert_fails(run_edge("resume", out), WorseError.exit_code, "made the model worse by step 4")
        assert json.loads(path.read_text())[lost] == found[lost]
    on = run_edge("resume", out, "--on-worse", "warn", "--json")
    assert on.code == 0, on.stderr
    assert summary_of(on)["steps"] == STEPS


@pytest.mark.parametrize("on_worse", ["warn", "stop"])
def test_without_held_out_data_the_training_loss_tells(
    place: Place, learned: Path, tmp_path: Path, on_worse: str
) -> None:
    out = tmp_path / "out"
    done = run(place, out, on_worse=on_worse, hold_out=0, init_adapter=learned)
    found = summary_of(done)
    assert found["is_worse"]
    assert f"training loss of the last {STEPS_OF_A_MEAN} steps" in done.stderr
    if on_worse == "stop":
        assert found["steps"] == STEPS_OF_A_MEAN + 1
        assert_fails(done, WorseError.exit_code, "saved: the adapter of step 11")
    else:
        assert (done.code, found["steps"]) == (0, STEPS)
        assert done.stderr.count("worse than before") == 2
    assert '<p class="worse">Worse than before: training loss' in (out / "report.html").read_text()


def test_a_run_that_learns_is_not_worse(place: Place, learned: Path) -> None:
    summary = json.loads((learned / "summary.json").read_text())
    assert (summary["is_worse"], summary["saved_step"]) == (False, 80)
    assert 'class="worse"' not in (learned / "report.html").read_text()


def test_a_loss_is_compared_with_the_one_before_training() -> None:
    def rows(*losses: float, first: int = 0) -> list[dict[str, Any]]:
        return [{"step": first + step, "loss": loss} for step, loss in enumerate(losses)]

    assert held_out_worsening([]) is None
    assert held_out_worsening(rows(2.0)) is None
    assert held_out_worsening(rows(2.0, 3.0, 2.0)) is None, "as good"
    assert held_out_worsening(rows(1.0, 2.0, first=3)) is None, "what was before is not known"
    assert held_out_worsening(rows(2.0, 1.0, 2.5)) == ("held-out loss", 2.0, 2.5)
    assert held_out_worsening(rows(2.0, 1.0, 2.5), 1.25) is None
    assert held_out_worsening(rows(2.0, float("nan"))) is not None


@pytest.mark.parametrize(("last", "is_worse"), [(2.0 * MOST_ABOVE - 0.01, False), (2.0 * MOST_ABOVE + 0.01, True)])
def test_a_mean_of_training_losses_is_compared_with_the_first(last: float, is_worse: bool) -> None:
    losses = TrainingLosses()
    losses.add(2.0)
    for _ in range(STEPS_OF_A_MEAN - 1):
        losses.add(last)
        assert losses.worsening is None, "too few to tell"
    losses.add(last)
    assert (losses.worsening is not None) is is_worse
    losses.add(float("nan"))
    assert losses.worsening is not None


def test_it_is_said_again_only_after_it_was_better() -> None:
    evaluations: list[dict[str, Any]] = []
    guard = Guard(evaluations, has_held_out=True)
    said = []
    for step, loss in enumerate((2.0, 3.0, 4.0, 2.0 * MOST_ABOVE, 3.0)):
        evaluations.append({"step": step, "loss": loss})
        said.append(guard.has_worsened() is not None)
    assert said == [False, True, False, False, True]


@pytest.mark.parametrize("loss", [3.6, 3.5 * MOST_ABOVE + 0.01])
@pytest.mark.parametrize("is_done", [False, True])
def test_a_page_is_red_when_a_run_says_so(tmp_path: Path, loss: float, is_done: bool) -> None:
    """On the way it may be a little worse, as it begins; in the end it may not."""
    out = write_run(tmp_path / "run", 40)
    first, *_ = (out / "evaluations.jsonl").read_text().splitlines()
    worse = json.dumps({**json.loads(first), "step": 40, "loss": loss})
    (out / "evaluations.jsonl").write_text(f"{first}\n{worse}\n")
    if not is_done:
        (out / "summary.json").unlink()
    assert (b'class="worse"' in run_page(out)) is (is_done or loss > 3.5 * MOST_ABOVE)
