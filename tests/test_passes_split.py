"""Training in passes computes what torch computes in one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import peft_reference as reference
import pytest
import torch
from answers import INVOCATION, random_answers
from families import FAMILIES, MORE_FAMILIES, VOCABULARY, tiny_model
from pass_oracle import PassOracle
from peft import PeftModel
from serving import config, random_dataset, randomize, randomize_all, serving, training
from tiny import TinyFactory

from dlora.edge.adapters.peft import load_adapter
from dlora.edge.training.defaults import default_target_modules
from dlora.protocol.kill_revive import UnitState
from dlora.protocol.manifest import load_manifest
from dlora.protocol.passes import Passes
from dlora.protocol.targets import choose_groups, target_names

PASSES = ["1,1", "2,1", "2,2", "3,3"]
BLOCKS = 4
HALF = {
    "active_fraction": 0.5, "score": "static", "static": (1, 3), "warmup_steps": 0, "warmup_fraction": 0.0,
    "ramp_fraction": 0.0,
}  # fmt: skip
"""Of four units two are trained."""


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_lora_are_those_of_torch(family: str, passes: str, tiny: TinyFactory) -> None:
    """All rows have adapters."""
    bundle, dataset = tiny(family, head_dtype="fp32").bundle, random_dataset(VOCABULARY)
    run = config(target_modules=("all-linear",), passes=passes)
    with serving(tiny(family).base) as server, training(bundle, server.url, run, dataset) as trainer:
        randomize(trainer)
        (batch,) = trainer.batches.step_batches(0)
        (losses,) = trainer.model.forward_backward([batch], step=0, grad_scale=1 / len(batch.labels))
    model = reference.with_adapters(tiny_model(family), trainer.adapters, run.adapter.rank, run.adapter.alpha)
    loss = PassOracle(model, batch, Passes.parse(passes)).run()
    assert losses.mean() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in trainer.adapters.parameters().items():
        wanted = reference.parameter(model, name).grad.numpy()
        assert np.abs(wanted).max() > 0, name
        assert np.linalg.norm(parameter.grad - wanted) / np.linalg.norm(wanted) < 1e-4, name


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.usefixtures("exact_factors")
@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE_FAMILIES)])
def test_gradients_of_the_default_are_those_of_torch(
    family: str, passes: str, tiny: TinyFactory, tmp_path: Path
) -> None:
    """A bottleneck that acts on answers."""
    bundle = tiny(family, head_dtype="fp32").bundle
    manifest = load_manifest(bundle)
    targets = default_target_modules("bottleneck", manifest, "answer")
    chosen = set(target_names(choose_groups(manifest, targets)))
    invocation = () if chosen.intersection(manifest.without_activation) else INVOCATION
    run = config(kind="bottleneck", target_modules=targets, invocation=invocation, basis_steps=2, passes=passes)
    with serving(tiny(family).base) as server, training(bundle, server.url, run, random_answers()) as trainer:
        randomize_all(trainer)
        (batch,) = trainer.batches.step_batches(0)
        (losses,) = trainer.model.forward_backward([batch], step=0, grad_scale=1 / len(batch.labels))
        trainer.save_adapter(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(family).eval(), tmp_path, is_trainable=True)
    loss = PassOracle(model, batch, Passes.parse(passes)).run()
    assert losses.mean() == pytest.approx(loss.item(), rel=1e-5)
    gains = trainer.adapters.gains
    for group in trainer.adapters.groups:
        grads = [gains[each.name] * reference.parameter(model, f"{each.name}.lora_B").grad for each in group.factors()]
        lora_b = torch.from_numpy(np.array(group.adapter_state_values()[1]))
        wanted = (lora_b.T @ torch.cat(grads)).numpy()
        (found,) = [parameter.grad for parameter in group.parameters().values()]
        assert np.abs(wanted).max() > 0, group.name
        assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-4, group.name


@pytest.mark.usefixtures("exact_factors")
def test_gradients_of_frozen_factors_are_those_of_torch(tiny: TinyFactory, tmp_path: Path) -> None:
    bundle, dataset = tiny(head_dtype="fp32").bundle, random_dataset(VOCABULARY)
    run = config(kind="ffa", target_modules=("all-linear",), passes="2,2")
    with serving(tiny().base) as server, training(bundle, server.url, run, dataset) as trainer:
        randomize_all(trainer)
        (batch,) = trainer.batches.step_batches(0)
        (losses,) = trainer.model.forward_backward([batch], step=0, grad_scale=1 / len(batch.labels))
        trainer.save_adapter(tmp_path)
    model = PeftModel.from_pretrained(tiny_model("llama").eval(), tmp_path, is_trainable=True)
    loss = PassOracle(model, batch, Passes.parse("2,2")).run()
    assert losses.mean() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in trainer.adapters.parameters().items():
        wanted = trainer.adapters.gains[name.removesuffix(".lora_B")] * reference.parameter(model, name).grad.numpy()
        assert np.abs(wanted).max() > 0, name
        assert np.linalg.norm(parameter.grad - wanted) / np.linalg.norm(wanted) < 1e-4, name


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("on_kill", ["hold_forward", "give_to_server"])
def test_killed_units_that_keep_their_effect_have_it_as_torch_says(
    on_kill: str, passes: str, tiny: TinyFactory, tmp_path: Path
) -> None:
    """Held, they exchange and are not trained; given to the server, they act in every pass, the base model's too."""
    bundle, dataset = tiny(blocks=BLOCKS, head_dtype="fp32").bundle, random_dataset(VOCABULARY)
    lora = partial(config, target_modules=("all-linear",), optimizer={"lr": 1e-6})
    run = lora(passes=passes, kill_revive={**HALF, "on_kill": on_kill})
    with serving(tiny(blocks=BLOCKS).base) as server:
        with training(bundle, server.url, lora(), dataset) as trainer:
            randomize_all(trainer)
            trainer.save_adapter(tmp_path)
        with training(bundle, server.url, run, dataset, init=load_adapter(tmp_path)) as trainer:
            trainer.run_step()
            trainer.wait_for_signal()
            (batch,) = trainer.batches.step_batches(1)
            (losses,) = trainer.model.forward_backward([batch], step=1, grad_scale=1 / len(batch.labels))
    units = trainer.adapters.units
    given = [group for unit in units if unit.state is UnitState.GIVEN for group in unit.groups]
    assert bool(given) is (on_kill == "give_to_server")
    model = tiny_model("llama", num_hidden_layers=BLOCKS)
    model = reference.with_adapters(model, trainer.adapters, run.adapter.rank, run.adapter.alpha)
    names = target_names(trainer.groups[group] for group in given)
    loss = PassOracle(model, batch, Passes.parse(passes), names).run()
    assert losses.mean() == pytest.approx(loss.item(), rel=1e-5)
    trained = [group for unit in units if unit.state is UnitState.ACTIVE for group in unit.groups]
    for name, parameter in (
        (n, p) for group in trained for n, p in trainer.adapters.groups[group].parameters().items()
    ):
        wanted = reference.parameter(model, name).grad.numpy()
        assert np.abs(wanted).max() > 0, name
        assert np.linalg.norm(parameter.grad - wanted) / np.linalg.norm(wanted) < 1e-4, name
