"""Gains of target modules: measured of a model, and a run is the same on a model that is written otherwise."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from families import VOCABULARY, tiny_model, tiny_tokenizer
from peft import PeftModel
from peft_reference import loss_of
from serving import config, random_dataset, serving, training
from torch import nn
from transformers import PreTrainedModel
from trunk_runs import trunk_config, trunk_training

from dlora.cloud.model.base_model import BaseModel
from dlora.edge.adapters.kind import SavedModule
from dlora.edge.adapters.lora import LoraGroup
from dlora.edge.adapters.peft import load_adapter
from dlora.edge.data.batches import evaluation_batches
from dlora.edge.training.checkpoint import load_latest
from dlora.edge.training.trainer import Trainer
from dlora.export.bundle import export_bundle
from dlora.export.gains import REFERENCE_GAIN, relative_gain
from dlora.export.settings import ExportSettings
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.groups import MAX_GAIN, GroupSpec, TargetSpec, with_gains, without_gains
from dlora.protocol.manifest import encode_manifest, load_manifest

BLOCKS = 3
STEPS = 4
LEARNING: dict[str, Any] = {"optimizer": {"lr": 0.3}}  # of random weights, whose gains are small


def change_norms(block: Any, c: float) -> None:
    """Norms times c, and what reads them over c."""
    block.input_layernorm.weight.mul_(c)
    block.post_attention_layernorm.weight.mul_(c)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(block.self_attn, name).weight.div_(c)
    for name in ("gate_proj", "up_proj"):
        getattr(block.mlp, name).weight.div_(c)


def change_values(block: Any, c: float) -> None:
    block.self_attn.v_proj.weight.mul_(c)
    block.self_attn.o_proj.weight.div_(c)


def change_mlp(block: Any, c: float) -> None:
    block.mlp.up_proj.weight.mul_(c)
    block.mlp.down_proj.weight.div_(c)


WAYS: dict[str, Callable[[Any, float], None]] = {"norms": change_norms, "values": change_values, "mlp": change_mlp}


class Place:
    """A model and its bundle."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        model.save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        export_bundle(
            ExportSettings(str(folder / "model"), folder / "bundle", head_dtype="fp32", device_blocks=2, rank=4)
        )
        self.model = model
        self.bundle = folder / "bundle"
        self.base = BaseModel.from_model(model, "tiny")

    @property
    def gains(self) -> dict[str, float]:
        groups = load_manifest(self.bundle).groups
        return {target.name: target.gain for group in groups for target in group.targets}


def rewritten(way: str, c: float) -> PreTrainedModel:
    model = tiny_model("llama", num_hidden_layers=BLOCKS)
    with torch.no_grad():
        for block in model.model.layers:
            WAYS[way](block, c)
    return model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tiny_model("llama", num_hidden_layers=BLOCKS), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module", params=[("norms", 1 / 16), ("values", 16.0), ("mlp", 4.0)], ids=str)
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(rewritten(*request.param), tmp_path_factory.mktemp("other"))


# -- what they are -------------------------------------------------------------------------------------------


def test_a_gain_is_the_gain_to_a_power_of_two() -> None:
    assert [relative_gain(REFERENCE_GAIN * factor) for factor in (1, 1.4, 1.5, 0.26, 8)] == [1, 1, 2, 0.25, 8]
    assert [relative_gain(gain) for gain in (0.0, math.nan, math.inf)] == [1, 1, 1]
    assert (relative_gain(1e-30), relative_gain(1e30)) == (1 / MAX_GAIN, MAX_GAIN)


def test_gains_are_those_of_texts(plain: Place) -> None:
    """Measured by another path: whole texts, module by module, and sums in place of medians."""
    gains: dict[str, float] = {}

    def measure(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        return lambda _, given, output: gains.update({name: float(output.norm() / given[0].norm())})

    hooks = [plain.model.get_submodule(name).register_forward_hook(measure(name)) for name in plain.gains]
    plain.model(input_ids=torch.randint(3, VOCABULARY, (8, 9), generator=torch.Generator().manual_seed(7)))
    for hook in hooks:
        hook.remove()
    assert len(gains) == 7 * BLOCKS
    assert len(set(plain.gains.values())) > 1, "or this test shows nothing"
    for name, gain in plain.gains.items():
        assert 0.5 < gains[name] / (REFERENCE_GAIN * gain) < 2, name


@pytest.mark.parametrize("gain", [0.0, -1.0, math.nan, math.inf, 2.0**41])
def test_a_gain_that_cannot_be_is_refused(gain: float) -> None:
    for encoding in (msgspec.json, msgspec.msgpack):
        raw = encoding.encode({"name": "a", "out_features": 1, "gain": gain})
        with pytest.raises(msgspec.ValidationError):
            encoding.decode(raw, type=TargetSpec)


def test_gains_are_put_on_and_taken_off() -> None:
    groups = (GroupSpec(0, 4, (TargetSpec("a", 4), TargetSpec("b", 2))),)
    changed = with_gains(groups, {"a": 2.0, "b": 0.5}.__getitem__)
    assert [target.gain for target in changed[0].targets] == [2.0, 0.5]
    assert without_gains(changed) == groups


# -- a run does not know how its model is written --------------------------------------------------------------


def trained(place: Place, run: Any) -> tuple[list[float], Trainer]:
    dataset = random_dataset(VOCABULARY)
    with serving(place.base) as server, training(place.bundle, server.url, run, dataset) as trainer:
        losses = [trainer.run_step().loss for _ in range(STEPS)]
        trainer.wait_for_signal()
    return losses, trainer


RUNS: dict[str, dict[str, Any]] = {
    "lora": {}, "ffa": {"kind": "ffa"}, "bottleneck": {"kind": "bottleneck", "lora_alpha": 4.0, "basis_steps": 2},
    "bottleneck of weights": {"kind": "bottleneck", "lora_alpha": 4.0, "basis": "weights"},
    "bottleneck over int8": {"kind": "bottleneck", "lora_alpha": 4.0, "basis_steps": 2, "wire_dtype": "int8"},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_on_a_model_that_is_written_otherwise(plain: Place, other: Place, name: str) -> None:
    run = config(target_modules=("all-linear",), **LEARNING, **RUNS[name])
    assert plain.gains != other.gains
    wanted, trainer = trained(plain, run)
    found, rewritten_trainer = trained(other, run)
    assert wanted[-1] != wanted[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for key, parameter in trainer.adapters.parameters().items():
        mine = rewritten_trainer.adapters.parameters()[key].value
        if "lora_A" not in key or np.abs(parameter.value).max() > 0:
            np.testing.assert_allclose(mine, parameter.value, rtol=1e-3, atol=1e-3 * np.abs(parameter.value).max())


def test_a_run_in_device_blocks_is_the_same_as_well(plain: Place, other: Place, tmp_path: Path) -> None:
    run, dataset, losses = trunk_config((1, 2), **LEARNING), random_dataset(VOCABULARY), []
    for name, place in (("plain", plain), ("other", other)):
        with (
            serving(place.base) as server,
            trunk_training(place.bundle, server.url, run, dataset, tmp_path / name) as trainer,
        ):
            losses.append([trainer.run_step().loss for _ in range(STEPS)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


# -- where they go -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_the_saved_adapter_is_a_plain_lora(plain: Place, name: str, tmp_path: Path) -> None:
    """PEFT finds the loss of the run, and a run that starts from it has that loss, too, with the same gains."""
    dataset, run = random_dataset(VOCABULARY), config(target_modules=("all-linear",), **LEARNING, **RUNS[name])
    with serving(plain.base) as server:
        with training(plain.bundle, server.url, run, dataset) as trainer:
            for _ in range(STEPS):
                trainer.run_step()
            loss = trainer.evaluate(dataset).loss
            trainer.save_adapter(tmp_path)
            values = {key: parameter.value.tobytes() for key, parameter in trainer.adapters.parameters().items()}
        init = load_adapter(tmp_path)
        with training(plain.bundle, server.url, run, dataset, init=init) as trainer:
            assert trainer.adapters.gains == plain.gains
            assert trainer.evaluate(dataset).loss == loss
            for key, parameter in trainer.adapters.parameters().items():
                assert parameter.value.tobytes() == values[key], key
    wrapped = PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=BLOCKS), tmp_path).eval()
    with torch.no_grad():
        found = loss_of(wrapped, list(evaluation_batches(dataset, 4))).item()
    assert found == pytest.approx(loss, abs=2e-3 if run.server.wire_dtype == "int8" else 1e-4)


@pytest.mark.parametrize("kind", ["lora", "ffa", "bottleneck"])
def test_a_checkpoint_has_its_gains(plain: Place, kind: str, tmp_path: Path) -> None:
    """Also where the bundle was exported again since, and has others."""
    dataset, run = random_dataset(VOCABULARY), config(target_modules=("all-linear",), **LEARNING, **RUNS[kind])
    with serving(plain.base) as server:
        with training(plain.bundle, server.url, run, dataset) as trainer:
            whole = [trainer.run_step().loss for _ in range(STEPS)]
        with training(plain.bundle, server.url, run, dataset) as trainer:
            losses = [trainer.run_step().loss for _ in range(2)]
            trainer.save_checkpoint(tmp_path / "checkpoints")
        again = tmp_path / "bundle"
        shutil.copytree(plain.bundle, again)
        manifest = load_manifest(again)
        changed = msgspec.structs.replace(manifest, groups=with_gains(manifest.groups, lambda _: 8.0))
        (again / "manifest.json").write_bytes(encode_manifest(changed))
        checkpoint = load_latest(tmp_path / "checkpoints")
        with training(again, server.url, run, dataset, checkpoint=checkpoint) as trainer:
            assert trainer.adapters.gains == plain.gains
            losses += [trainer.run_step().loss for _ in range(STEPS - 2)]
    assert losses == whole


def test_an_adapter_of_another_tool_has_its_effect(plain: Place) -> None:
    """Its B has no gain in it: it is taken out, and what the run learns is multiplied as ever."""
    group = next(group for group in load_manifest(plain.bundle).groups if group.targets[0].gain != 1.0)
    target = group.targets[0]
    random = np.random.default_rng(0)
    adapters = LoraGroup.create(AdapterSpec(r=2), group, scaling=2.0, random=random)
    lora_a, lora_b = (
        random.standard_normal(shape).astype(np.float32) for shape in ((2, group.in_features), (target.out_features, 2))
    )
    adapters.load_factors({target.name: SavedModule(target.name, lora_a, lora_b)}, {target.name: 3.0})
    found = adapters.factors()[0]
    np.testing.assert_allclose(2.0 * found.lora_B, 3.0 * lora_b, rtol=1e-6)
