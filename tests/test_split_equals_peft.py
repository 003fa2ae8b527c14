"""The one equality that the product stands on: the split computes what PEFT computes in one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peft_reference as reference
import pytest
import torch
from answers import INVOCATION, random_answers
from drawn import Each, one_in
from families import FAMILIES, MORE_FAMILIES, VOCABULARY, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from serving import config, final_weights, random_dataset, randomize, randomize_all, serving, training
from tiny import TinyFactory

from dlora.edge.data.batches import MicroBatch, evaluation_batches
from dlora.edge.training.defaults import default_target_modules
from dlora.edge.training.trainer import Trainer
from dlora.protocol.manifest import load_manifest
from dlora.protocol.targets import choose_groups, target_names

# fp32 throughout; sums are taken in another order.
GRADIENT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5


def in_every_family(name: str, settings: Sequence[Each]) -> pytest.MarkDecorator:
    """A family and one of two settings, each day the other one; of the plainest two, both."""
    cells = []
    for number, family in enumerate((*FAMILIES, *MORE_FAMILIES)):
        marks = [pytest.mark.slow] if family in MORE_FAMILIES else []
        tried = settings if family in ("llama", "gpt2") else one_in(2, settings, number)
        cells += [pytest.param(family, each, marks=marks) for each in tried]
    return pytest.mark.parametrize(("family", name), cells)


@in_every_family("targets", [(), ("all-linear",)])
def test_gradients_match_the_whole_model_in_every_family(
    family: str, targets: tuple[str, ...], tiny: TinyFactory
) -> None:
    bundle = tiny(family, head_dtype="fp32").bundle
    dataset = random_dataset(VOCABULARY)
    run = config(grad_accum=2, target_modules=targets)
    with serving(tiny(family).base) as server, training(bundle, server.url, run, dataset) as trainer:
        randomize(trainer)
        batches, split_loss = run_first_step(trainer)
    model = reference.with_adapters(tiny_model(family), trainer.adapters, run.adapter.rank, run.adapter.alpha)
    loss = reference.loss_of(model, batches)
    loss.backward()
    assert split_loss == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    worst = 0.0
    for name, parameter in trainer.adapters.parameters().items():
        wanted = reference.parameter(model, name).grad.numpy()
        assert np.abs(wanted).max() > 0, f"{name} has no gradient: the test shows nothing"
        worst = max(worst, float(np.linalg.norm(parameter.grad - wanted) / np.linalg.norm(wanted)))
    assert worst < GRADIENT_TOLERANCE


def run_first_step(trainer: Trainer) -> tuple[list[MicroBatch], float]:
    """Gradients of the first step, which the trainer's parameters then have: its micro-batches, and its mean loss."""
    batches = trainer.batches.step_batches(0)
    labelled = sum(len(batch.labels) for batch in batches)
    losses = trainer.model.forward_backward(batches, step=0, grad_scale=1 / labelled)
    return batches, float(sum(part.sum() for part in losses)) / labelled


@pytest.mark.usefixtures("exact_factors")
@in_every_family("kind", ["bottleneck", "ffa"])
def test_gradients_of_the_other_kinds_match_the_whole_model_in_every_family(
    family: str, kind: str, tiny: TinyFactory, tmp_path: Path
) -> None:
    """Of a bottleneck as the command has it by default: with a basis made of gradients, acting on answers."""
    bundle = tiny(family, head_dtype="fp32").bundle
    manifest = load_manifest(bundle)
    targets = default_target_modules("bottleneck", manifest, "answer")
    chosen = set(target_names(choose_groups(manifest, targets)))
    invocation = () if kind == "ffa" or chosen.intersection(manifest.without_activation) else INVOCATION
    assert invocation or kind == "ffa" or family == "mpt"
    run = config(kind=kind, grad_accum=2, target_modules=targets, invocation=invocation, basis_steps=2)
    dataset = random_answers() if kind == "bottleneck" else random_dataset(VOCABULARY)
    with serving(tiny(family).base) as server, training(bundle, server.url, run, dataset) as trainer:
        randomize_all(trainer)
        batches, split_loss = run_first_step(trainer)
        trainer.save_adapter(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(family).eval(), tmp_path, is_trainable=True)
    loss = reference.loss_of(model, batches)
    loss.backward()
    assert split_loss == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    for group in trainer.adapters.groups:
        gains = trainer.adapters.gains  # which lora_B has in it, and what is trained has not
        names = [each.name for each in group.factors()]
        grads = {name: gains[name] * reference.parameter(model, f"{name}.lora_B").grad for name in names}
        wanted = {f"{name}.lora_B": grad.numpy() for name, grad in grads.items()}
        if kind == "bottleneck":  # lora_B is the rows of the stacked B times the core
            lora_b = torch.from_numpy(np.array(group.adapter_state_values()[1]))
            wanted = {f"{group.name}.core": (lora_b.T @ torch.cat(list(grads.values()))).numpy()}
        for name, parameter in group.parameters().items():
            assert np.abs(wanted[name]).max() > 0, f"{name} has no gradient: the test shows nothing"
            error = np.linalg.norm(parameter.grad - wanted[name]) / np.linalg.norm(wanted[name])
            assert error < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize(("family", "targets", "blocks"), [
    ("llama", (), ()),
    ("llama", ("q_proj", "v_proj"), ()),
    ("llama", ("all-linear",), ()),
    ("llama", ("all-linear",), (1,)),
    ("llama", ("self_attn.o_proj", "model.layers.0.mlp.down_proj"), (0,)),
    ("gpt2", (), ()),
    ("cohere", ("o_proj", "up_proj"), ()),  # q, k and v share up's input: with them, up's group runs before o
])  # fmt: skip
def test_training_equals_peft_with_torch_adamw(
    tiny: TinyFactory, family: str, targets: tuple[str, ...], blocks: tuple[int, ...]
) -> None:
    bundle, dataset = tiny(family, head_dtype="fp32").bundle, random_dataset(VOCABULARY)
    run = config(
        total_steps=12, target_modules=targets, blocks=blocks,
        optimizer={"weight_decay": 0.01, "schedule": "cosine", "warmup": 3},
    )  # fmt: skip
    with serving(tiny(family).base) as server, training(bundle, server.url, run, dataset) as trainer:
        wanted = load_manifest(bundle).defaults.target_modules if targets == () else targets
        adapted = {each.name for group in trainer.adapters.groups for each in group.factors()}
        assert adapted == adapted_by_peft(family, wanted, blocks)
        model = reference.with_adapters(tiny_model(family), trainer.adapters, run.adapter.rank, run.adapter.alpha)
        losses = [trainer.run_step().loss for _ in range(run.total_steps)]
        learning_rates = [trainer.optimizer.lr(step) for step in range(run.total_steps)]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.01)
    for step in range(run.total_steps):
        optimizer.param_groups[0]["lr"] = learning_rates[step]
        optimizer.zero_grad()
        loss = reference.loss_of(model, trainer.batches.step_batches(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in trainer.adapters.parameters().items():
        wanted = reference.parameter(model, name).detach().numpy()
        assert np.linalg.norm(parameter.value - wanted) < 1e-3 * np.linalg.norm(wanted)


def adapted_by_peft(family: str, targets: tuple[str, ...], blocks: tuple[int, ...]) -> set[str]:
    """The modules that PEFT itself gives an adapter."""
    names = "all-linear" if targets == ("all-linear",) else list(targets)
    wrapped = get_peft_model(tiny_model(family), LoraConfig(r=1, target_modules=names, task_type="CAUSAL_LM"))
    adapted = {name for name, module in wrapped.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    return {name for name in adapted if not blocks or any(f".{block}." in name for block in blocks)}


@pytest.mark.parametrize("passes", ["live", "2,2"])
def test_the_saved_adapter_gives_peft_the_split_loss(tiny: TinyFactory, tmp_path: Path, passes: str) -> None:
    """Of those units that have an effect in the end; used live, however it was trained."""
    held_out = random_dataset(VOCABULARY, seed=1)
    kill_revive = {"active_fraction": 0.5, "warmup_steps": 2, "kill_every": 2}
    run = config(total_steps=10, kill_revive=kill_revive, passes=passes)
    bundle = tiny(head_dtype="fp32").bundle
    with serving(tiny().base) as server, training(bundle, server.url, run, random_dataset(VOCABULARY)) as trainer:
        for _ in range(run.total_steps):
            trainer.run_step()
        trainer.save_adapter(tmp_path / "adapter")
        split = trainer.evaluate(held_out, live=True)
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    with torch.no_grad():
        batches = list(evaluation_batches(held_out, 4))
        assert split.loss == pytest.approx(reference.loss_of(model, batches).item(), rel=1e-4)
    assert 0 < len(trainer.adapters.units) > sum(unit.state > 0 for unit in trainer.adapters.units)


def test_all_active_kill_and_revive_changes_no_bit(tiny: TinyFactory) -> None:
    bundle = tiny(head_dtype="fp32").bundle
    dataset = random_dataset(VOCABULARY)
    weights = []
    with serving(tiny().base) as server:
        for kill_revive in ({"score": "grad"}, {"score": "static", "static": (0, 1)}, {"score": "sensitivity"}):
            with training(bundle, server.url, config(kill_revive=kill_revive), dataset) as trainer:
                for _ in range(6):
                    trainer.run_step()
                weights.append(final_weights(trainer))
    for other in weights[1:]:
        for name, value in weights[0].items():
            assert value.tobytes() == other[name].tobytes(), name
