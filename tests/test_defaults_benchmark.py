"""benchmarks/defaults.py without its hours: models written otherwise, and what finished runs come to."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from families import tiny_model
from finished_runs import finished_run

from dlora.edge.training.defaults import DEFAULTS
from dlora.protocol.manifest import load_manifest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from defaults import is_wanted
from defaults_places import BASE, FACTORS, GRID, LORA, SMOLLM2, TRUNK, WAYS, all_places, recipes_of
from defaults_report import Table, make_bars, write_report
from economy_recipes import BASELINE, DEFAULT, FORMER, RECIPES
from economy_runs import Run, Settings
from small_models import FAMILIES

GPT2 = ("gpt2", "b10")


def settings(where: tuple[str, str], recipe: str, lr: float | None, seed: int = 0) -> Settings:
    of_recipe: dict[str, Any] = {"adapter": {}, "kill_revive": {}, "steps": None, "dtype": "float32"}
    return Settings(set=where[1], recipe=recipe, seed=seed, lr=lr, model=where[0], **of_recipe)


def runs_of(where: tuple[str, str], recipe: str, losses: dict[float | None, float], **more: Any) -> dict[str, Run]:
    """Runs with these losses by rate, on validation rows and on test rows; None: a rate that was found."""
    runs = [finished_run(settings(where, recipe, lr), loss, **more) for lr, loss in losses.items()]
    return {run.digest: run for run in runs}


def bars_of(*found: dict[str, Run]) -> dict[str, Any]:
    runs = {digest: run for each in found for digest, run in each.items()}
    return {name: entry for name, bar in make_bars(Table(runs)).items() if (entry := bar.entry()) is not None}


# -- models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factor", [1 / 16, 4])
def test_a_model_that_is_written_otherwise_is_the_same_function_to_the_bit(way: str, factor: float) -> None:
    model = tiny_model("llama")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before, weights = model(ids).logits, {name: weight.clone() for name, weight in model.named_parameters()}
        for block in model.model.layers:
            WAYS[way](block, factor)
        assert torch.equal(model(ids).logits, before)
    changed = {name.split(".")[-2] for name, weight in model.named_parameters() if not weight.equal(weights[name])}
    assert changed == (
        {"v_proj", "o_proj", "up_proj", "down_proj"}
        if way == "values"
        else {"input_layernorm", "post_attention_layernorm", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    )


def test_every_model_has_a_name_and_blocks_on_the_device() -> None:
    found = {place.model: place.device_blocks for place in all_places()}
    assert list(found) == [SMOLLM2, *FAMILIES, *(f"{SMOLLM2}-{way}-{factor:g}" for way in WAYS for factor in FACTORS)]
    assert list(found.values()) == [12, *[3] * len(FAMILIES), *[12] * 8]


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [((), True), (("gpt2",), True), (("gpt2/b10",), True), (("*/*/def*",), True), (("gpt2/*/lora",), False)],
)
def test_only_names_as_much_of_a_run_as_one_likes(patterns: tuple[str, ...], wanted: bool) -> None:
    assert is_wanted(patterns, "gpt2", "b10", "default") is wanted
    assert is_wanted(patterns, "gpt2") is True
    assert is_wanted(("qwen2/*",), "gpt2") is False


@pytest.mark.slow
def test_recipes_are_the_commands_for_the_bundle() -> None:
    bundle = Path(__file__).parents[1] / "build" / "smollm2"
    assert (bundle / "manifest.json").exists(), f"no bundle in {bundle}; run: make test-slow"
    recipes = recipes_of(all_places()[0], load_manifest(bundle))
    assert recipes[DEFAULT].adapter == RECIPES[DEFAULT].adapter
    assert recipes[BASELINE].adapter == RECIPES[BASELINE].adapter


# -- what runs come to -----------------------------------------------------------------------------------

LR = DEFAULTS["bottleneck"].lr


def test_the_best_rate_has_both_its_neighbours_tried() -> None:
    found = runs_of(GPT2, DEFAULT, {LR: 0.5, 2 * LR: 0.4, None: 0.7})
    assert Table(found).best(GPT2, DEFAULT) is None
    found |= runs_of(GPT2, DEFAULT, {4 * LR: 0.45})
    best, usual = Table(found).best(GPT2, DEFAULT), Table(found).usual(GPT2, DEFAULT)
    assert best is not None
    assert usual is not None
    assert (best.lr, usual.lr, usual.loss) == (2 * LR, None, 0.7)
    # What finds no rate has the one of its time.
    where = (SMOLLM2, "chat60")
    table = Table(runs_of(where, FORMER, {LR: 0.5, LR / 4: 0.4}) | runs_of(where, BASE, {1e-3: 2.0}))
    assert [table.usual(where, name).lr for name in (FORMER, BASE)] == [LR / 4, 1e-3]  # type: ignore[union-attr]


def test_regret_is_the_loss_above_the_best_rates() -> None:
    text = ("gpt2", "chat60")
    bars = bars_of(
        runs_of(GPT2, DEFAULT, {None: 0.5, LR: 0.5, 2 * LR: 0.48, 4 * LR: 0.5}, accuracy=0.9),
        runs_of(text, DEFAULT, {None: 2.0, LR / 8: 2.1, LR / 4: 2.0, LR / 2: 2.2}),
    )
    assert bars["default_regret_intents"]["value"] == pytest.approx(0.02)
    assert bars["default_regret_intents"]["holds"] is False
    assert bars["default_regret_intents"]["reason"] == "misses: gpt2/b10 0.02; 7 of 8 are not run"
    assert bars["default_regret_points"]["value"] == 0
    assert bars["default_regret_text"] | {"command": "", "missing": []} == {
        "what": "regret, %", "bar": 2.5, "value": 0.0, "holds": False, "command": "", "worst": "gpt2/chat60",
        "measured": 1, "missing": [], "reason": "11 of 12 are not run",
    }  # fmt: skip
    assert f"{SMOLLM2}/chat60" in bars["default_regret_text"]["missing"]
    assert "lora_regret_text" not in bars


def test_a_run_that_diverged_has_no_value_and_is_not_the_best() -> None:
    run = finished_run(settings(GPT2, DEFAULT, 2 * LR), 0.1)
    lost = msgspec.structs.replace(run, validation=None, test=None)
    table = Table({**runs_of(GPT2, DEFAULT, {LR / 2: 0.5, LR: 0.6}), run.digest: lost})
    assert table.with_rate(GPT2, DEFAULT, 2 * LR) is None
    assert table.best(GPT2, DEFAULT) is None  # LR / 4 is not tried


def test_what_is_kept_of_loras_gain_and_what_is_above_the_base() -> None:
    base, lora = runs_of(GPT2, BASE, {1e-3: 1.0}), runs_of(GPT2, BASELINE, {5e-4: 0.55, 1e-3: 0.5, 2e-3: 0.6})
    bars = bars_of(base, lora, runs_of(GPT2, DEFAULT, {None: 0.6}))
    assert bars["default_gain_kept"]["value"] == pytest.approx(0.8)
    assert bars["default_gain_kept"]["reason"] == "19 of 20 are not run"
    assert bars["default_over_base"]["value"] == pytest.approx(0.6)
    bars = bars_of(base, lora, runs_of(GPT2, DEFAULT, {None: 1.1}))
    assert bars["default_gain_kept"]["reason"] == "misses: gpt2/b10 -0.2; 19 of 20 are not run"
    assert bars["default_over_base"]["holds"] is False


def test_a_rewritten_model_is_compared_with_the_original() -> None:
    where = (f"{SMOLLM2}-norms-16", "b10")
    bars = bars_of(
        runs_of((SMOLLM2, "b10"), DEFAULT, {None: 0.05}, accuracy=0.9),
        runs_of(where, DEFAULT, {None: 0.055}, accuracy=0.9),
        runs_of((SMOLLM2, "b10"), LORA, {None: 0.1}),
        runs_of(where, LORA, {None: 0.101}),
    )
    assert bars["default_rewritten_intents"]["reason"].startswith(f"misses: {SMOLLM2}-norms-16/b10 0.005; ")
    assert bars["default_rewritten_points"]["reason"] == "7 of 8 are not run"
    assert bars["lora_rewritten"]["value"] == pytest.approx(1.0)


def test_the_section_stands_beside_the_other_ones(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks.md").write_text("# Benchmarks\n\n## Another\n\nText.\n")
    where = (f"{SMOLLM2}-values-4", "dialogue")
    runs = runs_of(GPT2, DEFAULT, {None: 0.5}) | runs_of(where, FORMER, {LR / 2: 1.5})
    runs |= runs_of(GPT2, TRUNK, {None: 0.4})
    write_report(runs, tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.startswith("# Benchmarks\n\n## Another\n\nText.\n\n## Without a rate")
    assert "| gpt2 | b10 |  |  | 0.5000, 90.0% (0.02) |  |  |  |  | 0.4000, 90.0% (0.02) |  | 0 |" in page
    assert "| values 4 |  |  |  | 1.5000 |" in page
    assert json.loads((tmp_path / "benchmarks" / "defaults.json").read_text()) == {}


def test_the_grid_goes_by_doubles_and_has_all_usual_rates() -> None:
    assert all(after == 2 * before for before, after in itertools.pairwise(GRID))
    assert {LR, LR / 4, DEFAULTS["lora"].lr} <= set(GRID)
