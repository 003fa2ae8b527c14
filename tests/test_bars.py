"""The bars that benchmarks write, and what benchmarks/step.py finds by formula, without its model."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from families import VOCABULARY
from serving import config, random_dataset, serving, training
from tiny import TinyFactory

from dlora.edge.training.defaults import DEFAULTS
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.errors import StorageError

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from bars import FILE, at_least, at_most, write_bars
from step_costs import (
    ALL_MODULES,
    LLAMA_3_8B,
    SMOLLM2,
    EndsClock,
    Widths,
    adapter_flops,
    adapter_flops_table,
    round_trips,
)

COMMAND = "python benchmarks/step.py"
DEFAULT = AdapterSpec("bottleneck", DEFAULTS["bottleneck"].r or 0)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


# -- bars ------------------------------------------------------------------------------------------------


def test_a_bar_holds_up_to_its_number_and_says_why_where_not() -> None:
    assert at_most(0.9, 0.9, COMMAND) == {"bar": 0.9, "value": 0.9, "holds": True, "command": COMMAND}
    missed = at_most(1e-4, 0.000123456, COMMAND)
    assert missed == {
        "bar": 1e-4, "value": 0.0001235, "holds": False, "command": COMMAND,
        "reason": "0.0001235 where at most 0.0001 is wanted",
    }  # fmt: skip
    assert not at_most(1.0, float("nan"), COMMAND)["holds"]
    # What is shown is rounded, and what decides is not.
    assert not at_most(0.9, 0.9000001, COMMAND)["holds"]
    assert at_least(5, 5.0, COMMAND) == {"bar": 5.0, "value": 5.0, "holds": True, "command": COMMAND}
    assert at_least(5, 4.9, COMMAND)["reason"] == "4.9 where at least 5 is wanted"
    assert at_least(5, 4.9, COMMAND, reason="slow")["reason"] == "slow"
    assert "reason" not in at_least(5, 5.0, COMMAND, reason="slow")
    assert not at_least(5, float("nan"), COMMAND)["holds"]


def test_bars_of_others_stay_and_names_are_sorted(tmp_path: Path) -> None:
    path = tmp_path / "docs" / FILE
    write_bars(path, {"z": at_most(1, 1, "one"), "m": at_most(1, 1, "one")})
    write_bars(path, {"m": at_most(1, 2, "another"), "a": at_most(1, 1, "another")})
    assert list(read(path)) == ["a", "m", "z"]
    assert [entry["command"] for entry in read(path).values()] == ["another", "another", "one"]
    write_bars(path, {"m": at_most(1, 1, "one")}, forget=["m", "z", "not there"])
    assert list(read(path)) == ["a", "m"]
    assert path.read_text().endswith("}\n")
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_bars_that_cannot_be_written_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "economy.json"
    write_bars(path, {"a": at_most(1, 1, "one")})
    before = path.read_bytes()

    def no_space(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(StorageError):
        write_bars(path, {"b": at_most(1, 1, "one")})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


# -- formulas ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "trips"), [(8, 65), (4, 33), (2, 17)])
def test_round_trips_are_two_a_group_and_one(blocks: int, trips: int) -> None:
    groups = SMOLLM2.groups(range(blocks), ALL_MODULES)
    assert len(groups) == 4 * blocks
    assert round_trips(DEFAULT, groups) == 2 * len(groups) + 1 == trips


@pytest.mark.parametrize("widths", [SMOLLM2, LLAMA_3_8B], ids=["SmolLM2", "Llama 3"])
def test_flops_are_those_of_the_products(widths: Widths) -> None:
    """Counted product by product: forward, gradient of the input, gradient of the weight."""
    lora, bottleneck = 0, 0
    for out_features in (widths.hidden, widths.kv) * widths.blocks:
        for m, n in ((8, widths.hidden), (out_features, 8)):
            lora += 2 * m * n + 2 * n * m + 2 * m * n
    for _ in range(8 * 4):
        bottleneck += 3 * 2 * DEFAULT.r * DEFAULT.r
    found = adapter_flops_table()[str(widths.hidden)]
    assert (found["lora"], found["bottleneck"]) == (lora, bottleneck)
    assert found["ratio"] == pytest.approx(lora / bottleneck, abs=0.01)


def test_flops_of_a_bottleneck_do_not_grow_with_the_model() -> None:
    narrow, wide = (adapter_flops(DEFAULT, each.groups(range(8), ALL_MODULES)) for each in (SMOLLM2, LLAMA_3_8B))
    assert narrow == wide


# -- the ends' clock -----------------------------------------------------------------------------------------


def test_the_clock_counts_embedding_and_head_and_changes_no_result(tiny: TinyFactory) -> None:
    dataset, losses = random_dataset(VOCABULARY), []
    with serving(tiny().base) as server:
        for counts in (False, True):
            with training(tiny().bundle, server.url, config(), dataset) as trainer:
                clock = EndsClock(trainer.model) if counts else None
                started = time.process_time()
                losses.append([trainer.run_step().loss for _ in range(3)])
                used = time.process_time() - started
    assert losses[0] == losses[1]
    assert clock is not None
    assert 0 < clock.seconds < used
