"""benchmarks/economy.py without its hours: which runs there are to be, what keeps them, and what they come to."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
from finished_runs import finished_run
from tiny import TinyFactory

from dlora.edge.training.defaults import DEFAULTS
from dlora.protocol.manifest import load_manifest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from economy_data import SETS
from economy_plot import Axis, Series, plot
from economy_recipes import BASELINE, DEFAULT, FORMER, FP16_ALL, GRID, RECIPES, SECOND, order, train_config
from economy_report import write_report
from economy_results import BARS, Rate, Result, accuracy_difference, find_result, loss_difference, measure_bars
from economy_runs import Plan, Rows, Run, RunsFile, Score, Settings, best_rate, next_rate

PLAN = Plan("tiny", "float32")


def kept(runs: Sequence[Run]) -> dict[str, Run]:
    return {run.digest: run for run in runs}


def made(set_name: str, recipe: str, settings: Settings) -> Run:
    """Rates have their best at 4e-3, which is also what is found; the new kinds are a little worse, and save a lot."""
    far = abs(math.log2((settings.lr or 4e-3) / 4e-3))
    loss = 0.5 + 0.1 * far + (0.0 if recipe == BASELINE else 0.01)
    return finished_run(settings, loss, bytes_per_token=160_000 if recipe == BASELINE else 3_200)


def all_runs(
    made: Callable[[str, str, Settings], Run] = made, pairs: Iterable[tuple[str, str]] | None = None
) -> dict[str, Run]:
    """Every run of every recipe on every set, as a benchmark that goes on to the end makes them."""
    found: dict[str, Run] = {}
    for set_name, recipe in order() if pairs is None else pairs:
        while (settings := PLAN.next(found, set_name, recipe)) is not None:
            run = made(set_name, recipe, settings)
            assert run.digest not in found
            found[run.digest] = run
    return found


def baseline_run(lr: float = 1e-3, seed: int = 0) -> Run:
    return made("b10", BASELINE, PLAN.settings("b10", BASELINE, lr, seed))


def finder(found: dict[str, Run]) -> Callable[[str, str, Rate], Result | None]:
    return lambda set_name, recipe, rate: find_result(found, PLAN, set_name, recipe, rate)


def bars_of(found: dict[str, Run]) -> dict[str, dict[str, Any]]:
    return measure_bars(finder(found))


# -- recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_run(name: str, tiny: TinyFactory) -> None:
    recipe = RECIPES[name]
    manifest = load_manifest(tiny(blocks=30, device_blocks=recipe.device_blocks).bundle)
    run = train_config(
        recipe, manifest, steps=40, batch_size=8, seed=1, optimizer={"lr": recipe.default_lr},
        invocation=(5,) if recipe.acts_on_answers else (),
    )  # fmt: skip
    assert (run.total_steps, run.seed, run.training.grad_accum) == (40, (1,), 1)
    assert run.units.budget_floor(30) in (1, 4, 8, 12, 30)
    assert (run.adapter.rank, run.adapter.kind) == (recipe.adapter["rank"], recipe.kind)
    assert run.adapter.alpha == recipe.adapter.get("lora_alpha", manifest.defaults.lora_alpha)
    assert run.server.wire_dtype == recipe.adapter.get("wire_dtype", "fp16")
    blocks = recipe.adapter.get("blocks", tuple(range(30)))
    assert {group.block for group in run.groups(manifest)} == set(blocks)
    assert set(recipe.bars) <= set(recipe.sets) <= set(SETS)


def test_what_a_user_gets_who_says_nothing_is_the_commands() -> None:
    default, of_kind = RECIPES[DEFAULT], DEFAULTS["bottleneck"]
    assert (default.default_lr, default.weight_decay) == (of_kind.lr, of_kind.weight_decay)
    assert default.adapter["rank"] == of_kind.r
    assert default.usual_lr("b10") is default.usual_lr("chat60") is None  # found
    # Recipes without gains have the rate of their time.
    former, lora = RECIPES[FORMER], RECIPES[BASELINE]
    assert [former.default_lr / former.usual_lr(name) for name in ("b10", "dialogue", "chat60")] == [1, 2, 4]
    assert lora.usual_lr("b10") == lora.usual_lr("chat60") == lora.default_lr


def test_every_recipe_is_run_on_all_its_sets_and_what_bars_rest_on_first() -> None:
    pairs = list(order())
    assert sorted(pairs) == sorted((name, recipe) for recipe in RECIPES for name in RECIPES[recipe].sets)
    barred = [name in RECIPES[recipe].bars for name, recipe in pairs]
    assert barred == sorted(barred, reverse=True)
    assert pairs[0] == ("chat60", BASELINE)
    assert RECIPES[DEFAULT].seeds("b10") == (0, 1, 2)
    assert RECIPES[DEFAULT].seeds("boolq") == RECIPES["random-1/8"].seeds("b10") == (0,)


# -- learning rates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("best", "tries"), [(1e-3, 3), (5e-4, 3), (4e-3, 4), (3.2e-2, 6)])
def test_rates_go_outward_while_that_gains_something(best: float, tries: int) -> None:
    tried: dict[float, float] = {}
    while (rate := next_rate(tried, 1e-3)) is not None:
        assert rate not in tried
        tried[rate] = 1 + abs(math.log2(rate / best))
    assert best_rate(tried) == best
    assert len(tried) == tries


def test_rates_begin_at_the_nearest_of_the_grid_and_one_that_diverges_is_the_worst() -> None:
    assert next_rate({}, 5e-3) == 4e-3
    assert next_rate({}, 1.0) == GRID[-1]
    tried: dict[float, float] = {}
    while (rate := next_rate(tried, 4e-3)) is not None:
        tried[rate] = math.inf if rate > 1e-3 else 1.0
    assert best_rate(tried) == 5e-4
    assert best_rate({1e-3: math.inf}) is None


# -- runs ------------------------------------------------------------------------------------------------


def asked_for(set_name: str, recipe: str) -> tuple[dict[str, Run], list[tuple[float | None, int]]]:
    """All runs of a recipe on a set, and the rates and seeds that were asked for, in order."""
    found = all_runs(pairs=[(set_name, recipe)])
    return found, [(run.settings.lr, run.settings.seed) for run in found.values()]


def test_a_recipe_chooses_its_rate_and_then_has_every_seed_with_it_and_with_its_default() -> None:
    found, asked = asked_for("b10", BASELINE)
    assert asked[:4] == [(1e-3, 0), (2e-3, 0), (4e-3, 0), (8e-3, 0)]
    assert asked[4:] == [(4e-3, 1), (4e-3, 2), (1e-3, 1), (1e-3, 2)]
    assert PLAN.chosen_lr(found, "b10", BASELINE) == 4e-3


def test_a_recipe_without_a_grid_is_the_same_runs_at_both_rates() -> None:
    found, asked = asked_for("b10", DEFAULT)
    assert asked == [(None, 0), (None, 1), (None, 2)]
    chosen, usual = finder(found)("b10", DEFAULT, "chosen"), finder(found)("b10", DEFAULT, "default")
    assert chosen is not None
    assert chosen == usual


def test_the_test_rows_choose_nothing() -> None:
    runs = [
        finished_run(PLAN.settings("b10", BASELINE, lr, 0), loss=test, validation=validation)
        for lr, test, validation in ((5e-4, 0.1, 3.0), (1e-3, 0.9, 1.0), (2e-3, 0.1, 2.0))
    ]
    assert PLAN.chosen_lr(kept(runs), "b10", BASELINE) == 1e-3


def test_the_baseline_is_the_one_whose_runs_are_committed() -> None:
    """These runs took hours. A new field of ``Settings`` has a default that leaves them as they are."""
    settings = Plan("smollm2-135m", "bfloat16").settings("b10", BASELINE, 1e-3, 0)
    assert settings.digest == "44c18781e1da"


@pytest.mark.parametrize("cut", [1, 40])
def test_finished_runs_are_read_again_and_a_torn_last_line_is_written_over(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "docs" / "runs.jsonl"
    runs = [baseline_run(seed=seed) for seed in (0, 1, 2)]
    file = RunsFile(path)
    for run in runs[:2]:
        file.append(run)
    assert RunsFile(path).runs == file.runs == kept(runs[:2])
    path.write_bytes(path.read_bytes()[:-cut])
    file = RunsFile(path)
    assert file.runs == kept(runs[:1])
    file.append(runs[2])
    assert RunsFile(path).runs == kept([runs[0], runs[2]])
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(SystemExit, match=r"runs\.jsonl:1 "):
        RunsFile(path)


# -- differences -----------------------------------------------------------------------------------------


def result_of(losses: Sequence[Sequence[float]], right: Sequence[str]) -> Result:
    runs = []
    for seed, (each, marks) in enumerate(zip(losses, right, strict=True)):
        rows = Rows(losses=[round(1000 * loss) for loss in each], labels=[1] * len(each), right=marks)
        score = Score(loss=float(np.mean(each)), accuracy=marks.count("1") / len(marks), rows=rows)
        runs.append(msgspec.structs.replace(baseline_run(seed=seed), test=score))
    return Result("b10", BASELINE, 1e-3, tuple(runs))


def test_intervals_are_of_pairs_and_as_wide_as_theory_says() -> None:
    """Rows differ wildly, and their differences little: the interval is 1.96 standard errors of these to each side."""
    rng = np.random.default_rng(0)
    theirs = rng.exponential(3.0, 400)
    gaps = rng.normal(0.05, 0.1, 400)
    ones = "1" * 400
    found = loss_difference(result_of([(theirs + gaps).tolist()], [ones]), result_of([theirs.tolist()], [ones]))
    assert found is not None
    assert found.mean == pytest.approx(gaps.mean(), abs=1e-4)
    expected = 1.96 * gaps.std() / math.sqrt(400)
    assert found.half_width == pytest.approx(expected, rel=0.08)  # 4,000 resamples
    assert found.low < found.mean < found.high


def test_accuracy_differs_in_points_and_seeds_are_pooled() -> None:
    ours, theirs = (result_of([[1.0] * 4] * 2, right) for right in (["1111", "1100"], ["1110", "1110"]))
    found = accuracy_difference(ours, theirs)
    assert found is not None
    assert found.mean == pytest.approx(0.0)
    assert found.low < 0 < found.high


def test_only_seeds_that_both_have_are_compared() -> None:
    ours, theirs = result_of([[1.0, 1.0]], ["11"]), result_of([[0.5, 0.5], [9.0, 9.0]], ["11", "11"])
    found = loss_difference(ours, theirs)
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert loss_difference(ours, theirs.of_seeds([1])) is None


# -- bars ------------------------------------------------------------------------------------------------


def test_every_bar_of_the_list_is_there_once_all_is_run_and_its_arithmetic() -> None:
    bars = bars_of(all_runs())
    assert list(bars) == list(BARS) == [
        "b10_loss", "b20_loss", "b10_accuracy", "b20_accuracy", "b10_traffic", "b20_traffic", "dialogue_loss",
        "dialogue_traffic", "second_loss", "second_traffic", "fp16_all_traffic", "chat60_loss", "chat60_traffic",
        "passes_chat60_loss", "passes_b10_loss", "passes_b10_accuracy", "passes_dialogue_loss", "passes_b20_loss",
        "passes_b20_accuracy", "passes_traffic", "passes_worse",
    ]  # fmt: skip
    for name, entry in bars.items():
        assert set(entry) == {"bar", "value", "holds", "command"} | (set() if entry["holds"] else {"reason"}), name
        assert entry["command"].startswith("python benchmarks/economy.py --only ")
    values = {name: pytest.approx(value) for name, value in {
        "b10_loss": 0.01, "b10_accuracy": 0.0, "b10_traffic": 98.0, "fp16_all_traffic": 98.0, "chat60_traffic": 2.0,
        "dialogue_loss": 2.0, "second_loss": 2.0,  # 0.01 of 0.5, in percent
    }.items()}  # fmt: skip
    assert {name: bars[name]["value"] for name in values} == values
    assert [name for name in values if not bars[name]["holds"]] == ["second_loss"]
    assert bars["second_loss"]["reason"] == "2 where at most 1 is wanted"
    assert bars["chat60_traffic"]["bar"] == 6.0
    # All rows differ by the same, so that there is no noise.
    assert bars["chat60_loss"] == {**bars["chat60_loss"], "bar": 0.0, "value": 0.01, "holds": False}


@pytest.mark.parametrize(
    ("loss", "bytes_per_token", "value", "reason"),
    [
        (0.5, 32_000, 80.0, "80 where at least 88 is wanted"),
        (0.9, 3_200, 98.0, "worse than the baseline on b20"),
    ],
)
def test_the_least_saving_of_the_sets_counts_and_only_for_what_is_not_worse(
    loss: float, bytes_per_token: float, value: float, reason: str
) -> None:
    def one_is_otherwise(set_name: str, recipe: str, settings: Settings) -> Run:
        if (set_name, recipe) == ("b20", FP16_ALL):
            return finished_run(settings, loss, bytes_per_token=bytes_per_token)
        return made(set_name, recipe, settings)

    entry = bars_of(all_runs(one_is_otherwise))["fp16_all_traffic"]
    assert (entry["value"], entry["holds"], entry["reason"]) == (value, False, reason)


def test_a_bar_whose_runs_are_not_all_there_is_left_out() -> None:
    found = all_runs()
    del found[PLAN.settings("b10", DEFAULT, None, 2).digest]
    assert set(BARS) - set(bars_of(found)) == {
        "b10_loss", "b10_accuracy", "b10_traffic", "passes_b10_loss", "passes_b10_accuracy", "passes_traffic",
    }  # fmt: skip


# -- the page --------------------------------------------------------------------------------------------


def test_the_report_keeps_other_benchmarks_bars(tmp_path: Path) -> None:
    other = {"bar": 1, "value": 1, "holds": True, "command": "another"}
    (tmp_path / "benchmarks").mkdir()
    path = tmp_path / "benchmarks" / "economy.json"
    path.write_text(json.dumps({"other": other, "b10_loss": other}))
    assert write_report({}, PLAN, tmp_path)["bars"] == {}
    assert json.loads(path.read_text()) == {"other": other}


def test_the_page_has_every_set_and_says_what_is_missing(tmp_path: Path) -> None:
    found = all_runs()
    assert write_report(found, PLAN, tmp_path)["missing"] == []
    text = (tmp_path / "benchmarks.md").read_text()
    for name in {name for name, _ in order()}:
        assert SETS[name].title[1:] in text
        assert f"(benchmarks/economy-{name}.svg)" in text
        ElementTree.parse(tmp_path / "benchmarks" / f"economy-{name}.svg")
    assert "Nothing." in text
    assert "nan" not in text
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert sum("without `--lr`" in line for line in tables) > 20
    del found[PLAN.settings("dialogue", SECOND, 4e-3, 2).digest]
    missing = write_report(found, PLAN, tmp_path)["missing"]
    assert [line.split(";")[0] for line in missing] == [f"{SECOND}: not finished on dialogue"]


def test_a_diverged_run_is_finished_and_has_no_line(tmp_path: Path) -> None:
    nothing = {"validation": None, "test": None, "curve": [], "train_loss_last": None}
    found = kept([msgspec.structs.replace(baseline_run(rate), **nothing) for rate in GRID])
    assert PLAN.chosen_lr(found, "b10", BASELINE) is None
    assert find_result(found, PLAN, "b10", BASELINE, "default") is None
    write_report(found, PLAN, tmp_path)


# -- plots -----------------------------------------------------------------------------------------------


def test_the_plot_is_well_formed_has_both_colour_schemes_and_labels_every_end() -> None:
    series = [
        Series(f"recipe <{index}> & more", tuple((10.0 ** (4 + step), (index + 1) / (step + 1)) for step in range(5)))
        for index in range(8)
    ]
    text = plot("a title & <more>", series, "loss")
    root = ElementTree.fromstring(text)
    texts = ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    for each in series:
        assert each.name in texts
        assert f"{each.points[-1][1]:.3f}" in texts or f"{each.points[-1][1]:.2f}" in texts
    assert "prefers-color-scheme:dark" in text
    assert any(label.endswith("MB") for label in texts)
    ElementTree.fromstring(plot("one point", [Series("one", ((1e6, 0.5),))], "loss"))


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0.9e6, 60e6, 0, 100, True), [1e6, 2e6, 5e6, 1e7, 2e7, 5e7]),
        (Axis(1.6, 2.2, 100, 0, False), [1.6, 1.7, 1.8, 1.9, 2.0, 2.1, 2.2]),
    ],
)
def test_ticks_are_round_and_within_the_axis(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks() == pytest.approx(ticks)
    assert axis.place(axis.low) == axis.start
    assert axis.place(axis.high) == pytest.approx(axis.end)
