"""What the user sees, and metrics.jsonl."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import made_step
from small_disk import small_disk

from dlora.edge.commands.doctor import show
from dlora.edge.commands.output import warn
from dlora.edge.run.display import Display, summary_table
from dlora.edge.run.kr_map import render_map
from dlora.edge.run.live_view import LossCurve
from dlora.edge.training.metrics import MetricsLog, StepMetrics, history, read_metrics
from dlora.protocol.errors import StorageError
from dlora.protocol.kill_revive import UnitState

A, F, H, K = UnitState.ACTIVE, UnitState.FADING, UnitState.HELD, UnitState.KILLED


def metrics(step: int, total: int = 100, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "loss": 2.5, "bytes_up": 840_000, "bytes_down": 420_000, "step_s": 0.5, "units": "011120",
    }  # fmt: skip
    return made_step(step, total, **{**values, **changes})


def states(*rows: str) -> list[tuple[int, Any]]:
    """One row a step, one digit a unit."""
    return [(step, np.array([int(digit) for digit in row], np.uint8)) for step, row in enumerate(rows)]


# -- metrics.jsonl ---------------------------------------------------------------------------------------------


def test_each_step_is_written_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "out" / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(3):
            log.write(metrics(step, loss=float("nan") if step == 1 else step / 3))
            assert len(path.read_bytes().splitlines()) == step + 1
    first = json.loads(path.read_text().splitlines()[2])
    assert (first["step"], first["loss"], first["units"]) == (2, 2 / 3, "011120")


def test_metrics_of_undone_steps_are_removed_at_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(10):
            log.write(metrics(step))
    with path.open("ab") as file:
        file.write(b'{"step":3,"los')  # a power cut
    with MetricsLog(path, first_step=5) as log:
        log.write(metrics(5, loss=9.0))
    read = read_metrics(path)
    assert [each.step for each in read] == [0, 1, 2, 3, 4, 5]
    assert read[-1] == metrics(5, loss=9.0)
    assert [(step, list(row)) for step, row in history(read)][5] == (5, [0, 1, 1, 1, 2, 0])
    MetricsLog(path).close()
    assert read_metrics(path) == []


def write_many(log: MetricsLog) -> None:
    for step in range(10_000):
        log.write(metrics(step))


def test_full_disk_leaves_whole_lines_in_metrics(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        path = disk / "metrics.jsonl"
        (disk / "ballast").write_bytes(bytes(990_000))
        with MetricsLog(path) as log, pytest.raises(StorageError, match="No space left"):
            write_many(log)
        assert path.read_bytes().endswith(b"\n")
        assert len(read_metrics(path)) > 10


# -- progress --------------------------------------------------------------------------------------------------


def test_plain_progress_is_printed_every_few_steps() -> None:
    stream = io.StringIO()
    display = Display(stream=stream)
    with display.training(200):
        for step in range(25):
            display.step(metrics(step, total=200))
        with display.evaluating("in between", 3) as advance:
            advance(3)
        display.warn("mind [the] gap")
    first, estimate, *lines = stream.getvalue().splitlines()
    assert first.startswith("step 1/200")
    assert estimate == "expected time: 1:38 for 197 steps"
    assert [line.split()[1] for line in lines[:-1]] == ["10/200", "20/200"]
    assert lines[0] == "step 10/200  loss 2.500  600 tok/s  0.84↑ 0.42↓ MB/step  active 4/6  eta 1:35"
    assert lines[-1] == "warning: mind [the] gap"


EVIL = "a [/peer]'s\n\twords\x1b[2J\x1b]0;title\x07 \x9b1m\u202eend\r"
PLAIN = "a [/peer]'s words[2J]0;title 1mend"


def test_control_characters_of_a_peer_are_removed(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    display = Display(stream=stream)
    display.say(EVIL)
    display.warn(EVIL)
    assert stream.getvalue() == f"{PLAIN}\nwarning: {PLAIN}\n"
    warn(EVIL)
    assert capsys.readouterr().err == f"warning: {PLAIN}\n"
    check = {"check": "server", "ok": False, "found": EVIL}
    show({"software": "x", "protocol_versions": [1], "checks": [check]})
    assert capsys.readouterr().out.splitlines()[-1].endswith(f": {PLAIN}")
    assert summary_table({"base_model": EVIL}) == f"base model  {PLAIN}"


START = "from dlora.edge.run.display import Display; import test_display as t\nr = Display()\n"


def shown_in_a_terminal(program: str, columns: int, lines: int = 24, **variables: str) -> str:
    """What ``START`` and ``program`` write to stderr in a real pseudo-terminal, without the codes that steer it."""
    main, child = pty.openpty()
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "PYTHONPATH": paths, "CI": ""}
    environment |= {"LINES": str(lines), **variables}
    with subprocess.Popen([sys.executable, "-c", START + program], stderr=child, env=environment) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                part = os.read(main, 65536)
            except OSError:  # Linux says so at the end
                break
            if not part:
                break
            shown += part
    os.close(main)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def test_a_terminal_gets_one_live_line() -> None:
    """Notes stand above the line, and plain lines do not appear."""
    text = shown_in_a_terminal(
        "with r.training(5):\n"
        "    with r.evaluating('', 7) as advance: advance(7)\n"
        "    r.say('a [note]')\n"
        "    for step in range(5): r.step(t.metrics(step, total=5))\n"
        "with r.evaluating('after', 4) as advance: advance(4)\n",
        columns=100,
    )
    assert "a [note]\r\n" in text
    assert "loss 2.500  600 tok/s  0.84↑ 0.42↓ MB/step  active 4/6  eta 0:00" in text
    assert "evaluate after" in text
    assert "step 1/5" not in text


TEN_STEPS = (
    "with r.training(10, blocks=(3, 5, 7, 8, 9, 11)):\n"
    "    for step in range(10): r.step(t.metrics(step, total=10, loss=3 - step / 5))\n"
)


def test_lines_in_a_terminal_end_between_words() -> None:
    words = "held out: 65 of 646 rows, to see how well the rest teaches; --hold-out 0 trains on all"
    lines = shown_in_a_terminal(f"r.say({words!r})", columns=40).splitlines()
    assert " ".join(lines) == words
    assert max(map(len, lines)) <= 40


def test_lines_go_nowhere_where_the_terminal_was_closed() -> None:
    """Its output is /dev/null then (``leave_closed_output``), and a run goes on to save its step."""
    shown_in_a_terminal("import os; os.dup2(os.open(os.devnull, os.O_WRONLY), 2); r.say('stopped')", columns=40)


def test_a_terminal_with_room_shows_the_run() -> None:
    """A curve with its ends, a character for each unit, and what has crossed; each line in the window's width."""
    text = shown_in_a_terminal(TEN_STEPS, columns=80)
    last = text.splitlines()[-8:]
    assert [len(line) <= 80 for line in last] == [True] * 8
    assert last[0].split() == ["3", last[0].split()[1]]
    assert last[4].startswith("    1.2 ")
    assert last[5] == " blocks 3 ·███▒· 11"
    assert last[6] == "     MB 8.4↑ 4.2↓ so far"
    assert last[7].startswith("10/10 loss 1.200")


@pytest.mark.parametrize(
    "size", [{"columns": 50, "lines": 24}, {"columns": 80, "lines": 10}, {"columns": 80, "PYTHONIOENCODING": "latin-1"}]
)
def test_a_terminal_without_room_for_a_view_has_its_line(size: dict[str, Any]) -> None:
    text = shown_in_a_terminal(f"import sys; sys.stderr.reconfigure(errors='replace')\n{TEN_STEPS}", **size)
    assert "so far" not in text
    assert "loss 1.200" in text


@pytest.mark.parametrize("variables", [{"CI": "1"}, {"TERM": "dumb"}])
def test_where_no_cursor_moves_there_are_lines(variables: dict[str, str]) -> None:
    text = shown_in_a_terminal(TEN_STEPS, columns=80, **variables)
    assert "step 10/10  loss 1.200" in text
    assert "so far" not in text


def test_a_curve_is_that_of_the_losses() -> None:
    """It falls as they do, over as much of the width as of the run is done, and takes no number that is none."""
    curve = LossCurve(1000)
    assert curve.lines(80) == []
    for step in range(500):
        curve.add(step, 5 - step / 100)
    curve.add(500, float("nan"))
    first, *_, last = curve.lines(80)
    assert (first.split()[0], last.split()[0]) == ("4.98", "0.04")
    assert max(map(len, curve.lines(80))) <= 8 + 37
    ends = [len(line) for line in curve.lines(80)]
    assert ends == sorted(ends)
    for steps in (1, 3):
        short = LossCurve(steps)
        short.add(0, 2.0)
        assert "2" in short.lines(80)[0]


def test_a_terminal_shows_how_far_a_basis_is() -> None:
    text = shown_in_a_terminal(
        "with r.setting_up() as show:\n"
        "    for done in (0, 1, 0, 1, 2): show('data', done, 3)\n"  # once, it lost its session and began again
        "    for done in range(9): show('groups', done, 9)\n",
        columns=100,
    )
    assert "making A and B: steps' data seen" in text
    assert "9/9" in text.splitlines()[-1]


def test_elsewhere_a_line_says_how_far_a_basis_is() -> None:
    """One for each step's data, which may take long, and one now and then for groups, which are many."""
    stream = io.StringIO()
    with Display(stream=stream).setting_up() as show:
        for done in range(3):
            show("data", done, 3)
        for done in range(100):
            show("groups", done, 100)
    lines = stream.getvalue().splitlines()
    assert lines[:3] == [f"making A and B: steps' data seen {done}/3" for done in range(3)]
    assert len(lines) <= 4


def test_elsewhere_a_long_evaluation_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr("dlora.edge.run.display.time.monotonic", lambda: now[0])
    with Display(stream=stream).evaluating("before", 30) as advance:
        for _ in range(30):
            now[0] += 1.0
            advance(1)
    assert stream.getvalue().splitlines() == [f"evaluating {seen}/30" for seen in (5, 10, 15, 20, 25)]


def test_the_live_line_of_a_long_run_fits_in_80_columns() -> None:
    text = shown_in_a_terminal(
        "big = dict(bytes_up=23_400_000, bytes_down=12_300_000, step_s=4.0, tokens=4800, units='1' * 30)\n"
        "with r.training(2000): r.step(t.metrics(999, total=2000, active_units=30, **big))\n",
        columns=80,
    )
    assert "1000/2000 loss 2.500  1200 tok/s  23.4↑ 12.3↓ MB/step  active 30/30  eta 1:06:40" in text


def test_result_is_printed_as_json_or_table(capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"steps": 20, "loss": 1.25, "wire": {"bytes_up": 5_000_000}, "none": None, "list": [1], "wall_s": 200.4}
    Display(json_output=True).finish(summary)
    assert json.loads(capsys.readouterr().out) == summary
    Display().finish(summary)
    assert capsys.readouterr().out.splitlines() == [
        "steps          20",
        "loss           1.25",
        "wire bytes up  5.00 MB",
        "wall           3:20",
    ]
    assert summary_table({}) == ""


@pytest.mark.parametrize(
    ("last_units", "blocks", "shown"), [("11", None, []), ("10", None, ["group 1", "group 0"]),
    ("10", (15, 29), ["block 29", "block 15"])],
)  # fmt: skip
def test_the_map_is_shown_once_something_was_killed(
    last_units: str, blocks: tuple[int, ...] | None, shown: list[str]
) -> None:
    stream = io.StringIO()
    display = Display(stream=stream)
    with display.training(2, blocks=blocks):
        display.step(metrics(0, total=2, units="11"))
        display.step(metrics(1, total=2, units=last_units))
    display.finish({"steps": 2})
    assert re.findall(r"^ *((?:group|block) \d+) ", stream.getvalue(), re.MULTILINE) == shown


def test_plain_progress_does_not_import_rich() -> None:
    program = "import sys, dlora.edge.run.display; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# -- the map ---------------------------------------------------------------------------------------------------


def test_map_shows_states_of_a_few_steps() -> None:
    assert render_map(states("1111", "1121", "1131", "1101", "0101")).splitlines() == [
        " block 3 █████",
        " block 2 █▒─··",
        " block 1 █████",
        " block 0 ████·",
        "    step 0   4",
        "         █ active  ▒ fading  ─ held  · killed",
    ]


def test_states_last_until_the_next_entry() -> None:
    full = render_map(states("11", "11", "11", "01", "01"))
    both, second = np.array([1, 1], np.uint8), np.array([0, 1], np.uint8)
    assert render_map([(0, both), (3, second), (4, second)]) == full


def test_map_column_shows_the_commonest_and_row_the_most_active_state() -> None:
    several = states("1111", "1000", "1000", "1000", "1000", "1000")
    numbered = render_map(several, width=11, height=2, numbers=(15, 17, 19, 21))
    assert [line.split()[0] for line in numbered.splitlines()[:2]] == ["19–21", "15–17"]
    assert render_map(several, numbers=(15, 17, 19, 21)).splitlines()[0].startswith("block 21 ")
    text = render_map(several, width=11, height=2)
    assert text.splitlines()[:2] == ["     2–3 ··", "     0–1 ██"]


@pytest.mark.parametrize(("units", "steps"), [(1, 1), (1, 500), (30, 1), (30, 120), (200, 5000)])
@pytest.mark.parametrize("colour", [False, True])
def test_map_of_any_size_fits(units: int, steps: int, colour: bool) -> None:
    rng = np.random.default_rng(0)
    rows = [(step, rng.integers(0, 4, units).astype(np.uint8)) for step in range(0, steps, 1 + steps // 300)]
    text = render_map(rows, width=80, height=40, colour=colour)
    bare = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = bare.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == min(units, 40) + 2
    assert ("\x1b[32m" in text) is (colour and "█" in bare)
    assert bare == render_map(rows, width=80, height=40)
