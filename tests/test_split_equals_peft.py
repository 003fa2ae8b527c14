"""The one equality that the product stands on: the split computes what PEFT computes in one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft_reference as reference
import pytest
import torch
from families import FAMILIES, MORE_FAMILIES, VOCABULARY, save_tiny, tiny_model
from peft import PeftModel
from serving import config, final_weights, random_dataset, randomize, serving, training

from dlora.cloud.model.base_model import BaseModel
from dlora.export.bundle import ExportSettings, export_bundle

# fp32 throughout; sums are taken in another order.
GRADIENT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5


def export_tiny(directory: Path, family: str, targets: tuple[str, ...] | None = None) -> Path:
    save_tiny(directory / "model", family)
    bundle = directory / "bundle"
    export_bundle(
        ExportSettings(str(directory / "model"), bundle, rank=4, alpha=8.0, target_modules=targets, head_dtype="fp32")
    )
    return bundle


@pytest.mark.parametrize("targets", [None, ("all-linear",)], ids=["default", "all-linear"])
@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE_FAMILIES)]
)
def test_gradients_of_every_family(family: str, targets: tuple[str, ...] | None, tmp_path: Path) -> None:
    bundle = export_tiny(tmp_path, family, targets)
    dataset = random_dataset(VOCABULARY)
    run = config(grad_accum=2)
    with (
        serving(BaseModel.from_model(tiny_model(family), "tiny")) as server,
        training(bundle, server.url, run, dataset) as trainer,
    ):
        randomize(trainer)
        batches = trainer.batches.step_batches(0)
        labelled = sum(len(batch.labels) for batch in batches)
        losses = trainer.model.forward_backward(batches, step=0, grad_scale=1 / labelled)
    model = reference.with_adapters(tiny_model(family), trainer.adapters, run.rank, run.lora_alpha)
    loss = reference.loss_of(model, batches)
    loss.backward()
    split_loss = float(sum(part.sum() for part in losses)) / labelled
    assert split_loss == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    worst = 0.0
    for name, parameter in trainer.adapters.parameters().items():
        wanted = reference.parameter(model, name).grad.numpy()
        assert np.abs(wanted).max() > 0, f"{name} has no gradient: the test shows nothing"
        worst = max(worst, float(np.linalg.norm(parameter.grad - wanted) / np.linalg.norm(wanted)))
    assert worst < GRADIENT_TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_equals_peft_with_torch_adamw(family: str, tmp_path: Path) -> None:
    bundle = export_tiny(tmp_path, family)
    dataset = random_dataset(VOCABULARY)
    run = config(total_steps=12, optimizer={"weight_decay": 0.01, "schedule": "cosine", "warmup": 3})
    with (
        serving(BaseModel.from_model(tiny_model(family), "tiny")) as server,
        training(bundle, server.url, run, dataset) as trainer,
    ):
        model = reference.with_adapters(tiny_model(family), trainer.adapters, run.rank, run.lora_alpha)
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


@pytest.mark.parametrize("kill_revive", [{}, {"active_fraction": 0.5, "warmup_steps": 2, "kill_every": 2}])
def test_the_saved_adapter_gives_peft_the_split_loss(kill_revive: dict[str, object], tmp_path: Path) -> None:
    bundle = export_tiny(tmp_path, "llama")
    dataset, held_out = random_dataset(VOCABULARY), random_dataset(VOCABULARY, seed=1)
    run = config(total_steps=10, kill_revive=kill_revive)
    with (
        serving(BaseModel.from_model(tiny_model("llama"), "tiny")) as server,
        training(bundle, server.url, run, dataset) as trainer,
    ):
        for _ in range(run.total_steps):
            trainer.run_step()
        trainer.save_adapter(tmp_path / "adapter")
        split = trainer.evaluate(held_out)
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    with torch.no_grad():
        from dlora.edge.data.batches import evaluation_batches

        batches = list(evaluation_batches(held_out, 4))
        assert split.loss == pytest.approx(reference.loss_of(model, batches).item(), rel=1e-4)
    if kill_revive:
        assert 0 < len(trainer.adapters.units) > sum(unit.state > 0 for unit in trainer.adapters.units)


def test_all_active_kill_and_revive_changes_no_bit(tmp_path: Path) -> None:
    bundle = export_tiny(tmp_path, "llama")
    dataset = random_dataset(VOCABULARY)
    weights = []
    with serving(BaseModel.from_model(tiny_model("llama"), "tiny")) as server:
        for kill_revive in ({"score": "change"}, {"score": "static", "static": (0, 1)}, {"score": "sensitivity"}):
            with training(bundle, server.url, config(kill_revive=kill_revive), dataset) as trainer:
                for _ in range(6):
                    trainer.run_step()
                weights.append(final_weights(trainer))
    for other in weights[1:]:
        for name, value in weights[0].items():
            assert value.tobytes() == other[name].tobytes(), name
