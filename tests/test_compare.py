"""``dlora-edge compare`` and ``dlora-edge report``: runs side by side, and a run's page made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from processes import run_edge
from runs import write_run
from test_report import numbers, series

from dlora.edge.report.comparison import compare
from dlora.edge.report.comparison_page import comparison_page
from dlora.edge.run.file_names import EVALUATIONS, METRICS
from dlora.edge.training.metrics import read_metrics
from dlora.protocol.errors import CheckpointError, DloraError, StorageError, UsageError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("runs")
    return [write_run(place / "a", 40, lr=0.01), write_run(place / "b", 60, lr=0.02, done=False, total=90)]


def test_numbers_are_those_of_the_runs(runs: list[Path]) -> None:
    comparison = compare(runs)
    found = comparison.to_json()
    first, second = found["runs"]
    metrics = [read_metrics(run / METRICS) for run in runs]
    assert (first["name"], first["done"], second["done"]) == ("a", "yes", "no")
    assert (first["steps"], second["steps"]) == (40, 60)
    assert (first["eval_loss_before"], first["eval_loss_best"], first["best_step"]) == (3.5, 2.25, 20)
    for run, steps in zip(found["runs"], metrics, strict=True):
        assert run["bytes_up"] == sum(step.bytes_up for step in steps)
        assert run["loss_last"] == steps[-1].loss
        assert run["s_per_step"] == pytest.approx(sum(step.step_s for step in steps) / len(steps))
        parts = ("device", "server", "turn", "wire", "rest")
        assert sum(run[f"{part}_s_per_step"] for part in parts) == pytest.approx(run["s_per_step"])
    assert found["differing_settings"] == {"--lr": ["0.01", "0.02"]}
    plots = numbers(comparison_page(comparison))
    assert set(plots) == {"held-out", "loss", "traffic", "time"}
    bytes_of_b = series(plots["traffic"])["b"]
    assert all(bytes_of_b[step.step] == step.bytes_up + step.bytes_down for step in metrics[1])
    assert {step: loss for step, loss in series(plots["held-out"])["b"].items() if loss} == {0: 3.5, 30: 2.25, 60: 2.5}


def test_what_is_not_comparable_is_said(runs: list[Path], tmp_path: Path) -> None:
    assert compare(runs).warnings == []
    other = shutil.copytree(runs[0], tmp_path / "x" / "a")
    file = json.loads((other / "run.json").read_text())
    file["eval_data"]["fingerprint"] = "other"
    (other / "run.json").write_text(json.dumps(file))
    comparison = compare([runs[0], other])
    assert list(comparison.names) == [f"{runs[0].parent.name}/a", "x/a"]
    assert len(comparison.warnings) == 1
    assert "their held-out data are different" in comparison.warnings[0]
    assert "their held-out data are different" in comparison_page(comparison).decode()


def test_the_command_prints_a_table_and_writes_a_page(runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "comparison.html"
    done = run_edge("compare", *runs, "--out", page)
    assert (done.code, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[:3] == [["a", "b"], ["--lr", "0.01", "0.02"], []]
    assert ["steps", "40", "60"] in lines
    assert page.read_bytes() == comparison_page(compare(runs))
    as_json = run_edge("compare", *runs, "--json")
    assert json.loads(as_json.stdout) == compare(runs).to_json()


def test_the_best_of_each_row_is_marked_where_runs_are_comparable(tmp_path: Path) -> None:
    """Best is low, or high where more is better; whoever has no value, or says the same, is not better."""
    runs = [write_run(tmp_path / name, 20) for name in ("a", "b", "c", "d")]
    for run, after, right in zip(runs, (2.5, 2.25, 2.250001, None), (0.5, 0.75, 0.5, 0), strict=True):
        set_evaluations(run, after, right)
    comparison = compare(runs)
    assert comparison.to_json()["best"] == {
        "eval_loss_after": ["b", "c"], "eval_loss_best": ["b", "c"], "token_accuracy": ["b"]
    }  # fmt: skip
    rows = dict(comparison.rows())
    assert rows["held-out tokens right"] == [("50.0%", False), ("75.0%", True), ("50.0%", False), ("–", False)]
    done = run_edge("compare", *runs)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["held-out", "tokens", "right", "50.0%", "75.0%", "*", "50.0%", "–"] in lines
    assert lines[-1] == ["*", "the", "best", "of", "its", "row"]
    page = comparison_page(comparison).decode()
    assert "<td>50.0%</td><td><strong>75.0%</strong></td><td>50.0%</td>" in page
    assert page.index("<h2>Settings</h2>") < page.index("<h2>Numbers</h2>")


def set_evaluations(run: Path, after: float | None, right: float) -> None:
    """One before the run, and one after it unless that is None."""
    row = json.loads((run / EVALUATIONS).read_text().splitlines()[0])
    rows = [row, *([] if after is None else [{**row, "step": 20, "loss": after, "token_accuracy": right}])]
    (run / EVALUATIONS).write_text("".join(json.dumps(each) + "\n" for each in rows))


def test_a_shorter_run_is_not_the_better_one(runs: list[Path], tmp_path: Path) -> None:
    """Nor one of other held-out data, or of another machine."""
    found = compare(runs).to_json()["best"]
    assert not {"bytes_up", "bytes_down", "steps_s"} & set(found)
    assert found["loss_last"] == ["b"]
    other = shutil.copytree(runs[1], tmp_path / "b")
    set_evaluations(other, 1.0, 0.9)
    found = compare([runs[0], other]).to_json()["best"]
    assert found["eval_loss_after"] == found["loss_last"] == found["tokens_per_s"] == ["b"]
    file = json.loads((other / "run.json").read_text())
    file["versions"]["machine"] = file["data"]["fingerprint"] = file["eval_data"]["fingerprint"] = "other"
    (other / "run.json").write_text(json.dumps(file))
    assert set(compare([runs[0], other]).to_json()["best"]) <= {"bytes_per_token", "round_trips_per_step"}


@pytest.mark.parametrize(("other", "error", "said"), [
    (None, UsageError, "two runs or more"),
    ("../run", UsageError, "is given twice"),
    ("none", CheckpointError, "is no run: it has no run.json"),
    (METRICS, CheckpointError, "is no run"),
    ("damaged", CheckpointError, "not a metrics file of this version"),
    ("another", CheckpointError, "cannot be read"),
    ("good", StorageError, "comparison.html"),
])  # fmt: skip
def test_what_cannot_be_compared_is_one_line(
    other: str | None, error: type[DloraError], said: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", 3)
    for name in ("damaged", "another", "good"):
        shutil.copytree(run, tmp_path / name)
        shutil.move(tmp_path / name, run)
    (run / "damaged" / METRICS).write_text('{"step": 1, "accuracy": 3}\n')
    (run / "another" / "run.json").write_text('{"settings": {}}')
    given = [run] if other is None else [run, run / other]
    done = run_edge("compare", *given, "--out", tmp_path / "no directory" / "comparison.html")
    assert (done.code, len(done.errors), done.stdout) == (error.exit_code, 1, ""), done.stderr
    assert said in done.errors[0]


def test_runs_without_steps_or_evaluations_are_compared(tmp_path: Path) -> None:
    empty, lone = write_run(tmp_path / "empty", 0), write_run(tmp_path / "lone", 1)
    (lone / "evaluations.jsonl").unlink()
    comparison = compare([empty, lone])
    assert comparison.to_json()["runs"][0]["s_per_step"] is None
    assert comparison_page(comparison)


def test_a_page_is_made_again(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", 3, done=False, total=9)
    done = run_edge("report", out)
    assert (done.code, done.stdout) == (0, f"{out / 'report.html'}\n")
    assert "3 of 9 steps" in (out / "report.html").read_text()
    elsewhere = run_edge("report", out, "--out", tmp_path / "page.html")
    assert elsewhere.code == 0
    assert (tmp_path / "page.html").read_bytes() == (out / "report.html").read_bytes()
    none = run_edge("report", tmp_path)
    assert (none.code, len(none.errors)) == (CheckpointError.exit_code, 1)


def test_names_of_strangers_steer_no_terminal(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a\x1b[2J", 3, pin="1\x1b]0;x\x07")
    done = run_edge("compare", first, write_run(tmp_path / "b", 3))
    assert done.code == 0
    assert "\x1b" not in done.stdout
