"""benchmarks/drift.py without its hours: which runs there are to be, what they come to, and the page it shares."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import pytest

from dlora.protocol.groups import evenly
from dlora.protocol.kill_revive import KillReviveConfig, Timetable, UnitState

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from drift_report import COLUMNS
from drift_report import write_report as write_drift
from drift_results import MEASURES, NONE_BEATS, gap, gaps, loss_b, mean_loss, summary, verdict
from drift_runs import (
    ACTIVE,
    ADAPTIVE,
    FIRST,
    HELD,
    QUICK,
    RIVALS,
    SEEDS,
    VARIANTS,
    Plan,
    Run,
    Ticks,
    changed_units,
    steps_held,
)
from economy_report import write_report as write_economy
from economy_runs import Plan as EconomyPlan
from economy_runs import Score, Settings, TrainedFile
from sections import DRIFT, section_of, with_section

PLAN = Plan("tiny", "float32")
UNITS = 8
STEPS = 134  # of an epoch of task B


def finished_run(settings: Settings, b: float, *, a: float = 1.0, validation: float | None = None) -> Run:
    """A run with these losses on the tasks, which killed two units and revived one."""
    return Run(
        digest=settings.digest, settings=settings, data="data", commit="", date="2026-11-26", steps=10, tokens=100,
        labelled=20, bytes_up=5000, bytes_down=5000, set_up_bytes=10, report_bytes=10, evaluation_bytes=0,
        bytes_per_token=100.0, round_trips_per_step=17, edge_compute_s=1.0, device_cpu_s=2.0, wall_s=3.0,
        train_loss_last=b, reconnects=0, steps_rerun=0, history=[(0, "110"), (3, "300"), (4, "401")], given_bytes=8500,
        validation={"a": Score(loss=a, accuracy=0.5), "b": Score(loss=validation or b, accuracy=0.9)},
        test={"a": Score(loss=a, accuracy=0.5), "b": Score(loss=b, accuracy=0.9)},
    )  # fmt: skip


def runs_of(variant: str, *losses: float, validation: float | None = None) -> list[Run]:
    return [finished_run(PLAN.settings(variant, s), loss, validation=validation) for s, loss in enumerate(losses)]


def all_runs(**losses: tuple[float, float, float]) -> dict[str, list[Run]]:
    """Every score and rival with every seed; the losses on task B are 0.5, but for those given."""
    return {name: runs_of(name, *losses.get(name, (0.5, 0.5, 0.5))) for name in (*RIVALS, *ADAPTIVE)}


def kept(runs: dict[str, list[Run]]) -> dict[str, Run]:
    return {run.digest: run for found in runs.values() for run in found}


# -- variants --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_setting_of_kill_and_revive_with_its_budget(name: str) -> None:
    settings = PLAN.settings(name, 0)
    config = msgspec.convert(settings.kill_revive, KillReviveConfig)
    config.check(UNITS)
    assert config.budget_floor(UNITS) == {"all": 8, "one-block": 1}.get(name, 2)
    timetable = Timetable(config, UNITS, STEPS)
    assert timetable.is_fixed is not VARIANTS[name].changes
    if VARIANTS[name].changes:
        assert timetable.begins_at_floor
        assert timetable.is_long_enough
    if VARIANTS[name].role:
        assert config.on_kill == "give_to_server"


def test_static_is_what_the_command_takes_by_default() -> None:
    assert VARIANTS["static"].kill_revive["static"] == evenly(range(UNITS), 2)
    assert VARIANTS["one-block"].kill_revive["static"] == evenly(range(UNITS), 1)


def test_all_is_run_once_and_what_the_verdict_rests_on_begins() -> None:
    pairs = list(PLAN.order())
    assert sorted(pairs) == sorted((name, seed) for name in VARIANTS for seed in VARIANTS[name].seeds)
    assert pairs[:9] == [(name, seed) for seed in SEEDS for name in ("static", "random", "grad")]
    assert list(Plan("tiny", "float32", quick=True).order()) == [(name, 0) for name in QUICK]
    assert (RIVALS, ADAPTIVE) == (("static", "random"), ("grad", "change", "sensitivity"))


def test_another_variant_seed_tick_or_task_is_another_run() -> None:
    other = Plan("tiny", "float32", Ticks(kill_every=6))
    settings = [PLAN.settings(name, seed) for name in VARIANTS for seed in SEEDS]
    settings += [PLAN.first(seed) for seed in SEEDS] + [other.settings("grad", 0)]
    assert len({each.digest for each in settings}) == len(settings)
    assert other.settings("static", 0) == PLAN.settings("static", 0)  # it has no ticks


# -- runs ------------------------------------------------------------------------------------------------


def test_only_steps_that_change_units_are_kept_and_the_end() -> None:
    assert [str(int(state)) for state in (UnitState.ACTIVE, UnitState.HELD)] == [ACTIVE, HELD]
    units = ["1133", "1144", "1144", "3144", "4144", "4114"]  # the last is after the last step
    assert changed_units(units) == [(0, "1133"), (1, "1144"), (3, "3144"), (4, "4144"), (5, "4114")]
    assert changed_units([]) == []
    assert steps_held(units) == [1, 0, 1, 1]


def test_kills_and_revivals_are_turns_after_the_first_step() -> None:
    (run,) = runs_of("grad", 0.5)
    assert (run.kills, run.revivals) == (2, 1)
    begun_inactive = msgspec.structs.replace(run, history=[(0, "1333"), (1, "1444")])
    assert (begun_inactive.kills, begun_inactive.revivals) == (0, 0)


def test_finished_runs_are_read_again_and_diverged_ones_have_no_scores(tmp_path: Path) -> None:
    file = TrainedFile(tmp_path / "runs.jsonl", Run)
    good, bad = runs_of("grad", 0.5, 0.6)
    bad = msgspec.structs.replace(bad, validation=None, test=None, train_loss_last=None)
    for run in (good, bad):
        file.append(run)
    again = TrainedFile(tmp_path / "runs.jsonl", Run).runs
    assert [(key, run.settings.digest, run.test) for key, run in again.items()] == [
        (run.digest, run.digest, run.test) for run in (good, bad)
    ]
    assert PLAN.find(again, "grad") == [again[good.digest]]
    assert PLAN.find(again, FIRST) == []


# -- what they come to -----------------------------------------------------------------------------------


def test_a_variant_has_medians_and_ranges_over_its_seeds() -> None:
    found = summary(runs_of("static", 0.4, 0.2, 0.9))
    assert list(found) == list(MEASURES)
    assert set(COLUMNS) <= set(MEASURES)
    assert (found["loss_b"].median, found["loss_b"].least, found["loss_b"].most) == (0.4, 0.2, 0.9)
    assert found["mean_loss"].median == 0.7  # of 0.4 and 1.0
    assert (found["kills"].median, found["revivals"].most) == (2, 1)


def test_a_gap_is_to_the_better_rival_of_each_seed() -> None:
    found = gap({0: 0.1, 1: 0.5, 2: 0.1}, [{0: 0.3, 1: 0.4, 2: 0.5}, {0: 0.2, 1: 0.6, 2: 0.3}])
    assert found is not None
    assert found.by_seed == pytest.approx({0: -0.1, 1: 0.1, 2: -0.2})
    assert found.median == pytest.approx(-0.1)
    assert found.spread == pytest.approx(0.4)  # the second's 0.6 - 0.2
    assert found.beats is False


def test_only_seeds_that_all_have_are_compared() -> None:
    found = gap({0: 0.1, 2: 0.3}, [{0: 0.2, 1: 9.0}, {0: 0.3, 1: 0.1, 2: 0.1}])
    assert found is not None
    assert list(found.by_seed) == [0]
    assert found.median < -found.spread
    assert found.beats is None
    assert gap({2: 0.1}, [{0: 0.2}]) is None


def test_gaps_have_only_scores_and_can_be_of_the_mean() -> None:
    runs = all_runs(grad=(0.3, 0.3, 0.3))
    assert list(gaps(runs, loss_b)) == list(ADAPTIVE)
    assert gaps(runs, loss_b)["grad"].median == pytest.approx(-0.2)
    assert gaps(runs, mean_loss)["grad"].median == pytest.approx(-0.1)


# -- the verdict -----------------------------------------------------------------------------------------


def test_a_score_that_beats_its_rivals_by_more_than_their_spread_holds() -> None:
    entry = verdict(all_runs(static=(0.5, 0.6, 0.55), grad=(0.3, 0.35, 0.3)))
    assert entry is not None
    assert entry == {"bar": -0.1, "value": -0.2, "holds": True, "command": entry["command"]}
    assert entry["command"] == "python benchmarks/drift.py --only static random grad change sensitivity"


@pytest.mark.parametrize("grad", [(0.45, 0.45, 0.45), (0.5, 0.5, 0.5), (0.9, 0.9, 0.9)])
def test_less_than_the_spread_is_no_gain(grad: tuple[float, float, float]) -> None:
    entry = verdict(all_runs(static=(0.5, 0.6, 0.55), grad=grad))
    assert entry is not None
    assert not entry["holds"]
    assert entry["reason"] == NONE_BEATS


def test_no_difference_and_no_spread_is_no_gain() -> None:
    entry = verdict(all_runs())
    assert entry is not None
    assert (entry["bar"], entry["value"], entry["holds"]) == (0.0, 0.0, False)


def test_test_rows_choose_no_score() -> None:
    """``change`` is the best on validation rows and ``grad`` on test rows."""
    runs = all_runs(grad=(0.1, 0.1, 0.1)) | {"change": runs_of("change", 0.6, 0.6, 0.6, validation=0.01)}
    entry = verdict(runs)
    assert entry is not None
    assert (entry["value"], entry["holds"]) == (pytest.approx(0.1), False)
    assert entry["reason"] == "change, which validation rows choose, does not; on test rows does grad"


@pytest.mark.parametrize("name", [*RIVALS, *ADAPTIVE])
def test_there_is_no_verdict_before_all_runs(name: str) -> None:
    runs = all_runs()
    runs[name].pop()
    assert verdict(runs) is None


# -- the page --------------------------------------------------------------------------------------------


def test_sections_are_replaced_in_their_place_and_new_ones_come_last() -> None:
    page = "# Page\n\nintro\n\n## One\n\nfirst\n\n## Two\n\nsecond\n"
    assert section_of(page, "One") == "## One\n\nfirst\n\n"
    assert section_of(page, "Three") == ""
    assert with_section(page, "One", "## One\n\nnew\n") == page.replace("first", "new")
    assert with_section(page, "Three", "## Three\n\nthird") == page + "\n## Three\n\nthird\n"
    assert with_section(page, "One", "") == "# Page\n\nintro\n\n## Two\n\nsecond\n"
    assert with_section(page, "Three", "") == page
    assert with_section("", "One", "## One\n") == "## One\n"


def test_both_tools_write_one_page_and_keep_each_others_part(tmp_path: Path) -> None:
    other, page = EconomyPlan("tiny", "float32"), tmp_path / "benchmarks.md"
    write_economy({}, other, tmp_path)
    alone = page.read_text()
    write_drift(kept(all_runs()), PLAN, tmp_path)
    both = page.read_text()
    assert both.startswith(alone)
    assert NONE_BEATS in section_of(both, DRIFT)
    write_economy({}, other, tmp_path)
    assert page.read_text() == both
    write_drift(kept(all_runs()), PLAN, tmp_path)
    assert page.read_text() == both
    bars = json.loads((tmp_path / "benchmarks" / "economy.json").read_text())
    assert list(bars) == ["drift"]


def test_the_report_has_every_variant_and_says_what_is_missing(tmp_path: Path) -> None:
    found = kept(all_runs()) | kept({FIRST: [finished_run(PLAN.first(0), 4.0, a=0.1)]})
    report = write_drift(found, PLAN, tmp_path)
    assert json.loads((tmp_path / "benchmarks" / "drift.json").read_text()) == report
    assert set(report["variants"]) == {FIRST, *RIVALS, *ADAPTIVE}
    assert report["verdict"]["reason"] == NONE_BEATS
    assert "all, seed 0" in report["missing"]
    text = (tmp_path / "benchmarks.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| ") and "given to the server" in line]
    assert len(table) == len(RIVALS) + len(ADAPTIVE)
    assert len({line.count("|") for line in table}) == 1


def test_without_runs_there_is_no_verdict_and_no_bar(tmp_path: Path) -> None:
    write_drift(kept(all_runs()), PLAN, tmp_path)
    report = write_drift({}, PLAN, tmp_path)
    assert (report["verdict"], report["gaps_on_b"], report["variants"]) == (None, {}, {})
    assert json.loads((tmp_path / "benchmarks" / "economy.json").read_text()) == {}
