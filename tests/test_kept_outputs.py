"""Kill and Revive over blocks on the device: what is not trained is not computed, and what stays the same is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from serving import final_weights, random_dataset, randomize, serving
from tiny import Tiny, TinyFactory
from trunk_runs import HARMS, losses_in_two_parts, trunk_config, trunk_training

from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.cache_key import CacheKey
from dlora.edge.model.kept_outputs_cache import kept_outputs_path
from dlora.edge.model.trained_block import TrainedBlock
from dlora.edge.run.blocks import open_blocks
from dlora.edge.settings import Placement
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connecting import ConnectSettings
from dlora.protocol.controller import Controller
from dlora.protocol.errors import CheckpointError
from dlora.protocol.groups import GroupSpec, TargetSpec, group_units
from dlora.protocol.kill_revive import KillReviveConfig

BLOCKS = (1, 2, 3)
STEPS = 16  # of three examples each: four epochs
# Of the units, blocks 1 to 3: the last one is trained.
FRESH = {"is_new": True, "connecting": ConnectSettings(), "warn": print}
LAST_ONLY = {"score": "static", "static": (2,), "on_kill": "hold_forward"}
TWO_AT_A_TIME = {
    "active_fraction": 0.6, "score": "random", "on_kill": "hold_forward", "warmup_steps": 0, "warmup_fraction": 0.0,
    "ramp_fraction": 0.0, "kill_every": 8, "revive_every": 8, "probation": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny: TinyFactory) -> Tiny:
    return tiny(blocks=4, device_blocks=3, head_dtype="fp32")


@pytest.fixture(scope="module")
def data(model: Tiny) -> Dataset:
    return random_dataset(model.base.vocabulary_size)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often a pass of which block was run."""
    found: Counter[tuple[str, int]] = Counter()
    for name in ("forward", "backward"):
        original = getattr(TrainedBlock, name)

        def counted(block: Any, *given: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            found[name, block.spec.index] += 1
            return original(block, *given)

        monkeypatch.setattr(TrainedBlock, name, counted)
    return found


def test_backward_ends_at_the_lowest_active_unit(
    model: Tiny, data: Dataset, passes: Counter[tuple[str, int]], tmp_path: Path
) -> None:
    """And what it gives of those above is what it gives where all are active."""
    grads = []
    for name, kill_revive in (("some", {**LAST_ONLY, "static": (1,)}), ("all", {})):
        settings = trunk_config(BLOCKS, kill_revive=kill_revive)
        with (
            serving(model.base) as server,
            trunk_training(model.bundle, server.url, settings, data, tmp_path / name) as trainer,
        ):
            randomize(trainer)
            passes.clear()
            batches = trainer.batches.step_batches(0)
            trainer.model.forward_backward(batches, step=0, grad_scale=1.0)
            parameters = trainer.adapters.parameters()
            grads.append({name: each.grad for name, each in parameters.items() if each.grad is not None})
            assert [passes["forward", block] for block in BLOCKS] == [1, 1, 1]
            assert [passes["backward", block] for block in BLOCKS] == ([0, 1, 1] if name == "some" else [1, 1, 1])
    some, everything = grads
    assert {name.split(".")[2] for name in some} == {"2"}
    assert {name.split(".")[2] for name in everything} == {"1", "2", "3"}
    assert all(np.array_equal(grad, everything[name]) for name, grad in some.items())


def test_killed_lowest_blocks_are_run_once_for_each_text(
    model: Tiny, data: Dataset, passes: Counter[tuple[str, int]], tmp_path: Path
) -> None:
    """With the losses of a run that computes them at each step, but for the order of sums."""
    found = {}
    with serving(model.base) as server:
        for holds in (True, False):
            settings = trunk_config(BLOCKS, kill_revive=LAST_ONLY, total_steps=STEPS, keeps_outputs=holds)
            with trunk_training(model.bundle, server.url, settings, data, tmp_path / str(holds)) as trainer:
                randomize(trainer)  # a killed unit has an effect, too
                passes.clear()
                losses = [trainer.run_step().loss for _ in range(STEPS)]
                found[holds] = losses, final_weights(trainer), dict(passes)
    (held, of_held, passes_held), (computed, of_computed, passes_computed) = found[True], found[False]
    assert np.allclose(held, computed, rtol=1e-5)
    assert all(np.allclose(of_held[name], value, rtol=1e-3, atol=1e-5) for name, value in of_computed.items())
    assert passes_computed["forward", 1] == passes_computed["forward", 3] == STEPS
    assert passes_held["forward", 1] == passes_held["forward", 2] == 1  # all texts fit into one pack
    assert passes_held["forward", 3] == passes_held["backward", 3] == STEPS
    assert kept_outputs_path(tmp_path / "True").exists()
    assert not kept_outputs_path(tmp_path / "False").exists()


@pytest.mark.parametrize("harm", HARMS)
def test_what_was_kept_is_made_again_with_the_same_bits(model: Tiny, data: Dataset, harm: str, tmp_path: Path) -> None:
    """A run that goes on after a kill has none, a part, or one of another time of what it had kept."""
    run = trunk_config(BLOCKS, kill_revive=LAST_ONLY, total_steps=STEPS, keeps_outputs=True)
    with serving(model.base) as server:
        whole = losses_in_two_parts(model.bundle, server.url, run, data, tmp_path / "whole")
        assert losses_in_two_parts(model.bundle, server.url, run, data, tmp_path / "cache", HARMS[harm]) == whole


def test_outputs_of_revived_blocks_are_not_used(
    model: Tiny, data: Dataset, passes: Counter[tuple[str, int]], tmp_path: Path
) -> None:
    """The units that are trained change; every step has the loss of a run that keeps nothing."""
    found, units = {}, []
    with serving(model.base) as server:
        for holds in (True, False):
            settings = trunk_config(BLOCKS, kill_revive=TWO_AT_A_TIME, total_steps=64, keeps_outputs=holds, seed=(6,))
            with trunk_training(model.bundle, server.url, settings, data, tmp_path / str(holds)) as trainer:
                passes.clear()
                steps = [trainer.run_step() for _ in range(64)]
                found[holds] = [step.loss for step in steps]
                units.append([step.units for step in steps])
                if holds:
                    assert 0 < passes["forward", 1] < 64
    assert units[0] == units[1]
    assert len(set(units[0])) > 1
    assert np.allclose(found[True], found[False], rtol=1e-4)


@pytest.mark.slow
def test_killed_blocks_are_skipped_where_all_blocks_are_here(
    tiny: TinyFactory, passes: Counter[tuple[str, int]], tmp_path: Path
) -> None:
    """The mode ``local``: no server is there, and what is kept is encrypted with a key."""
    whole = tiny(blocks=3, device_blocks=3, head_dtype="fp32")
    texts = random_dataset(whole.base.vocabulary_size)
    key = CacheKey(bytes(range(32)))
    losses = {}
    for cache_mb, of_key in ((0, None), (9, None), (9, key)):
        settings = trunk_config(
            (0, 1, 2), is_local=True, kill_revive=LAST_ONLY, total_steps=STEPS, keeps_outputs=bool(cache_mb)
        )
        bundle = Bundle.open(whole.bundle)
        engine = OnnxEngine(bundle, 1)
        out = tmp_path / str(len(losses))
        out.mkdir()
        settings = msgspec.structs.replace(settings, placement=Placement(cache_mb=cache_mb))
        with open_blocks(bundle, engine, settings, out, key=of_key, **FRESH) as blocks:
            trainer = Trainer(bundle, engine, blocks.make_side, settings, texts)
            randomize(trainer)
            passes.clear()
            losses[cache_mb, of_key] = [trainer.run_step().loss for _ in range(STEPS)]
        often = 1 if cache_mb else STEPS
        assert [passes["forward", block] for block in range(3)] == [often, often, STEPS]
        assert (out / "trunk-cache-kept.bin").exists() == bool(cache_mb)
    (computed, kept, sealed) = losses.values()
    assert kept == sealed
    assert np.allclose(kept, computed, rtol=1e-5)
    with (
        # As encrypted as it was, or not at all.
        open_blocks(bundle, engine, settings, out, key=None, **FRESH) as blocks,
        pytest.raises(CheckpointError, match="is encrypted; give its --cache-key-file"),
    ):
        Trainer(bundle, engine, blocks.make_side, settings, texts).run_step()


def test_data_that_are_passed_over_once_are_not_held(
    model: Tiny, data: Dataset, passes: Counter[tuple[str, int]], tmp_path: Path
) -> None:
    settings = trunk_config(BLOCKS, kill_revive=LAST_ONLY, total_steps=4, keeps_outputs=True)
    with (
        serving(model.base) as server,
        trunk_training(model.bundle, server.url, settings, data, tmp_path / "cache") as trainer,
    ):
        passes.clear()
        for _ in range(4):
            trainer.run_step()
    assert passes["forward", 1] == 4
    assert not kept_outputs_path(tmp_path / "cache").exists()


@pytest.mark.parametrize("seed", range(20))
def test_no_unit_changes_within_unchanged_steps(seed: int) -> None:
    """Of random settings, by the controller itself; and these steps are the same, whichever of them is asked about."""
    rng = np.random.default_rng(seed)
    count, steps = int(rng.integers(3, 9)), int(rng.integers(20, 200))
    config = KillReviveConfig(
        active_fraction=float(rng.choice([0.2, 0.5, 1.0])),
        score=str(rng.choice(["grad", "random", "static"])),  # type: ignore[arg-type]
        warmup_steps=int(rng.choice([0, 5])),
        warmup_fraction=float(rng.choice([0.0, 0.1])),
        ramp_fraction=float(rng.choice([0.0, 0.3])),
        kill_every=int(rng.integers(1, 12)),
        revive_every=int(rng.choice([0, 3, 7, 10])),
        probation=int(rng.integers(0, 6)),
        on_kill="hold_forward",
        static=(0,),
    )
    groups = [GroupSpec(block, 4, (TargetSpec(f"{block}.q_proj", 4),)) for block in range(count)]
    assert len(group_units(groups, config.unit)) == count
    controller = Controller(config, groups, seed=seed, total_steps=steps)
    timetable, before = controller.timetable, controller.states
    for step in range(1, steps):
        states = controller.report(step - 1, rng.random(count))
        unchanged = timetable.unchanged_steps(step)
        assert step in unchanged
        assert unchanged.stop <= steps
        if step - 1 in unchanged:
            assert timetable.unchanged_steps(step - 1) == unchanged
            assert (states == before).all()
        before = states
