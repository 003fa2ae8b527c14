"""A run's page: its numbers are those of its files, it is there whenever the run saves, and it asks for nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pytest
from msgspec.json import encode
from processes import finish, run_edge, start_edge
from runs import made_step, settings, write_run
from test_resume import KILLING, Place, place, wait_for_lines

from dlora.edge.report.comparison import compare
from dlora.edge.report.document import document
from dlora.edge.report.page import run_page
from dlora.edge.report.settings import shown_settings
from dlora.edge.report.steps import MOST_PLOTTED, read_steps
from dlora.edge.report.time_split import split_of
from dlora.edge.report.writer import ReportWriter
from dlora.edge.run.file_names import METRICS, REPORT, SUMMARY, TENSORBOARD
from dlora.edge.training.metrics import StepMetrics, read_metrics
from dlora.protocol.errors import CheckpointError

__all__ = ["place"]  # a fixture


def numbers(page: bytes) -> dict[str, Any]:
    """The plots of a page, by their names."""
    found = re.search(rb'<script id="numbers" type="application/json">(.*?)</script>', page, re.S)
    assert found is not None
    return {plot["id"]: plot for plot in json.loads(found[1])["plots"]}


def series(plot: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """Values by step, of each line."""
    return {each["label"]: dict(zip(plot["steps"], each["values"], strict=True)) for each in plot["series"]}


def check_against_metrics(out: Path, page: bytes) -> None:
    """Every number that is plotted is one of ``metrics.jsonl``, to the last bit."""
    steps = {each.step: each for each in read_metrics(out / METRICS)}
    plots = numbers(page)
    for name, label, key in (
        ("loss", "loss of a step", "loss"),
        ("rate", "learning rate", "learning_rate"),
        ("gradient", "norm", "grad_norm"),
    ):
        shown = {step: value for step, value in series(plots[name])[label].items() if value is not None}
        assert shown
        assert shown == {step: getattr(steps[step], key) for step in shown}
    if "traffic" in plots:
        for step in plots["traffic"]["steps"]:
            sides = {"↑": 0, "↓": 0}
            for label, values in series(plots["traffic"]).items():
                sides[label[-1]] += values[step]
            assert (sides["↑"], sides["↓"]) == (steps[step].bytes_up, steps[step].bytes_down)
    for step in plots["time"]["steps"]:
        assert sum(values[step] for values in series(plots["time"]).values()) == pytest.approx(steps[step].step_s)


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", 40)
    page = run_page(out)
    check_against_metrics(out, page)
    plots = numbers(page)
    assert plots["loss"]["steps"] == list(range(41))  # and the evaluation after the last
    held_out = series(plots["loss"])["held-out loss"]
    assert {step: value for step, value in held_out.items() if value is not None} == {0: 3.5, 20: 2.25, 40: 2.5}
    losses = [each.loss for each in read_metrics(out / METRICS)]
    means = series(plots["loss"])["mean of 5 steps"]
    assert means[20] == pytest.approx(sum(losses[16:21]) / 5)
    assert means[1] == pytest.approx(sum(losses[:2]) / 2)
    text = page.decode()
    assert "3.5000 → 2.5000" in text
    assert "best 2.2500 after 20 steps" in text
    cards = re.findall(r'<div class="card"><dt>(.*?)</dt><dd>(.*?)</dd><dd>(.*?)</dd></div>', text)
    assert cards[1] == ("held-out tokens right", "50.0% → 50.0%", "examples wholly right 10.0% → 10.0%")
    (out / "evaluations.jsonl").unlink()
    assert "tokens right" not in run_page(out).decode()
    assert "12,000" in text  # tokens
    assert f"{sum(each.bytes_up + each.bytes_down for each in read_metrics(out / METRICS)) / 1e6:.2f} MB" in text
    assert "dlora-cloud 0.1.0" in text


def test_plotted_steps_of_a_long_run_keep_what_stands_out(tmp_path: Path) -> None:
    """And the file has a size that does not grow with the run."""
    out = write_run(tmp_path / "run", 1)
    with (out / METRICS).open("wb") as file:
        for step in range(20_000):
            changes = {"loss": 99.5} if step == 7777 else {"loss": -3.0} if step == 4321 else {}
            if step == 11_111:
                changes = {"step_s": 77.0}
            file.write(encode(made_step(step, 20_000, **changes)) + b"\n")
    page = run_page(out)
    check_against_metrics(out, page)
    plots = numbers(page)
    assert len(plots["time"]["steps"]) <= MOST_PLOTTED + 2
    assert len(page) < 700_000
    losses = series(plots["loss"])["loss of a step"]
    assert (losses[7777], losses[4321]) == (99.5, -3.0)
    assert {0, 19_999} <= set(plots["loss"]["steps"])
    assert 11_111 in plots["time"]["steps"]
    assert "of the 20,000 steps are plotted" in page.decode()
    assert read_steps(out / METRICS).tokens == 20_000 * 300


class _Outside(HTMLParser):
    """What a page names that lies outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "action", "data")]


def test_a_page_asks_for_nothing(tmp_path: Path) -> None:
    page = run_page(write_run(tmp_path / "run")).decode()
    outside = _Outside()
    outside.feed(page)
    assert outside.found == []
    assert "default-src &#39;none&#39;" in page
    assert "url(" not in page
    assert "@import" not in page
    assert "Copyright (c) 2022 Leon Sorokin" in page
    assert "<noscript><p" in page
    assert page.count("<table") >= 8, "what is plotted stands in tables, too"


def test_text_of_strangers_is_escaped(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    page = run_page(write_run(tmp_path / "run", name=evil, pin="<b>")).decode()
    assert evil not in page
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<b>" not in page


def test_what_a_template_names_and_was_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="'names' is undefined"):
        document("comparison", "Runs", ())


def test_settings_have_no_seed_and_no_place_of_a_file() -> None:
    shown = shown_settings(settings(seed=1234, token_file=Path("/home/me/token"), eval=Path("/home/me/held.csv")))
    assert shown["--seed"] == "chosen"
    assert shown["--token-file"] == "given"
    assert (shown["--data"], shown["--eval"]) == ("chat.jsonl", "held.csv")
    assert not any("/" in value for value in shown.values())


def test_a_time_is_split_into_what_adds_up_to_it() -> None:
    for name in ("paused_s", "server_compute_s", "waiting_s", "server_queued_s", "edge_compute_s"):
        step: StepMetrics = made_step(3, 10, **{name: 9.0})
        split = split_of(step)
        parts = (split.device, split.server, split.turn, split.wire, split.rest)
        assert sum(parts) == pytest.approx(step.step_s)
        assert min(parts) >= 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", None, "is no run: it has no run.json"),
        ("run.json", b"{}", "cannot be read"),
        ("metrics.jsonl", b'{"step":0}\n', "is not a metrics file of this version"),
        ("evaluations.jsonl", b"x", "evaluations.jsonl cannot be read"),
        ("summary.json", b"[" * 100_000, "summary.json cannot be read"),
        ("summary.json", b"[]", "is no summary"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", 3)
    (out / name).unlink()
    if content is not None:
        (out / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        run_page(out)


def test_a_page_of_a_run_in_passes_has_its_live_loss(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", 4, passes="2,1")
    summary = json.loads((out / SUMMARY).read_text())
    (out / SUMMARY).write_text(json.dumps({**summary, "eval_loss_live": 2.3751, "is_worse_live": True}))
    page = run_page(out).decode()
    assert "held-out loss live, as PEFT" in page
    assert "2.3751" in page
    assert "in passes 2,1" in page
    found = compare([out, write_run(tmp_path / "live", 4)]).to_json()["runs"]
    assert [run["eval_loss_live"] for run in found] == [2.3751, None]


def test_a_run_that_is_not_done_has_a_page(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", 4, total=9, done=False)
    assert "4 of 9 steps, not done" in run_page(out).decode()
    (out / METRICS).write_bytes(b"")
    assert "No step is done yet" in run_page(out).decode()
    (out / METRICS).unlink()
    (out / "evaluations.jsonl").unlink()
    assert "No step is done yet" in run_page(out).decode()


def test_steps_without_a_server_have_a_page(tmp_path: Path) -> None:
    """As in trunk, which asks before the first step, or tells of no server's time, and local."""
    out = write_run(tmp_path / "run", 1, device_blocks="all")
    silent: dict[str, Any] = {"server_compute_s": 0.0, "server_queued_s": 0.0}
    for changes, said in (
        ({"bytes_up": 0, "bytes_down": 0, "up": {}, "down": {}, "waiting_s": 0.0}, "No step asked a server"),
        ({}, "server and wire"),
    ):
        with (out / METRICS).open("wb") as file:
            for step in range(4):
                file.write(encode(made_step(step, 4, units="111", **silent, **changes)) + b"\n")
        page = run_page(out)
        check_against_metrics(out, page)
        assert said in page.decode()
        assert "All 3 blocks were active in all steps." in page.decode()


def test_a_page_is_made_as_often_as_its_time_allows(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", 4)
    times = iter((0.0, 2.0, 100.0, 300.0, 300.0, 300.5, 1000.0, 1000.0))
    writer = ReportWriter(out, pytest.fail, lambda: next(times))
    page = out / REPORT

    def is_made(told: Any) -> bool:
        page.unlink(missing_ok=True)
        told()
        return page.exists()

    writer.begin(0)
    assert is_made(lambda: writer.step(made_step(0, 4)))  # took 2 s
    assert not is_made(lambda: writer.step(made_step(1, 4)))
    assert not is_made(writer.saved)  # after 98 s
    assert is_made(writer.saved)  # after 298 s
    assert is_made(writer.end)


def test_a_damaged_file_costs_the_page_and_not_the_run(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", 4)
    (out / "evaluations.jsonl").write_text("x")
    said: list[str] = []
    ReportWriter(out, said.append).end()
    assert len(said) == 1
    assert "no report.html: " in said[0]
    assert not (out / REPORT).exists()


def test_a_run_leaves_its_page(place: Place, tmp_path: Path) -> None:
    """Also one that is killed, and it goes on with the run."""
    out = tmp_path / "out"
    process = start_edge(*place.train(out, "--eval", place.data, *KILLING))
    wait_for_lines(out / METRICS, 8)
    process.kill()
    finish(process)
    killed = (out / REPORT).read_bytes()
    assert b", not done" in killed
    assert run_edge("resume", out).code == 0
    page = (out / REPORT).read_bytes()
    check_against_metrics(out, page)
    text = page.decode()
    assert ", done" in text
    assert "Kill and Revive" in text
    assert "<svg" in text
    assert not list(out.glob(".report*"))
    assert not (out / TENSORBOARD).exists(), "nobody asked for that"


def test_what_makes_pages_is_small() -> None:
    """It comes into a process that trains."""
    program = (
        "import sys, dlora.edge.report.page, dlora.edge.report.writer; "
        "sys.exit(bool({'rich', 'torch', 'onnxruntime', 'websockets.sync'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
