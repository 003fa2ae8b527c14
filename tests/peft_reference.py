"""The same training in one process, by PEFT and torch: what the split must equal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from dlora.edge.adapters.units import AdapterSet
from dlora.edge.data.batches import MicroBatch
from dlora.edge.training.trainer import Trainer


def with_adapters(model: PreTrainedModel, adapters: AdapterSet, rank: int, alpha: float) -> PeftModel:
    """``model`` as PEFT wraps it, with the device's adapters: each module's gain is in its scaling, so that what is
    trained is the same."""
    factors = [each for group in adapters.groups for each in group.factors()]
    names = [each.name for each in factors]
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM"))
    wrapped.eval()
    for each in factors:
        module, gain = wrapped.base_model.model.get_submodule(each.name), adapters.gains[each.name]
        module.scaling["default"] *= gain
        for half, value in (("lora_A", each.lora_A), ("lora_B", each.lora_B / np.float32(gain))):
            getattr(module, half)["default"].weight.data.copy_(torch.from_numpy(np.array(value)))
    return wrapped


def parameter(model: PeftModel, full_name: str) -> torch.nn.Parameter:
    """PEFT's own of a device's parameter: ``lora_A`` or ``lora_B`` of a target module."""
    name, _, half = full_name.rpartition(".")
    return getattr(model.base_model.model.get_submodule(name), half)["default"].weight


def loss_of(model: torch.nn.Module, batches: Sequence[MicroBatch]) -> torch.Tensor:
    """Mean cross-entropy over the labelled tokens of all micro-batches, padded on the right."""
    total = torch.zeros(())
    labelled = sum(len(batch.labels) for batch in batches)
    for batch in batches:
        longest = int(batch.sequence_lengths.max())
        ids = torch.zeros(len(batch.sequence_lengths), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        rows = []
        start = 0
        for index, length in enumerate(batch.sequence_lengths.tolist()):
            ids[index, :length] = torch.from_numpy(np.array(batch.ids[start : start + length]))
            mask[index, :length] = 1
            rows += range(index * longest, index * longest + length)
            start += length
        logits = model(input_ids=ids, attention_mask=mask).logits
        chosen = torch.tensor(rows)[torch.from_numpy(np.array(batch.label_positions)).long()]
        flat = logits.reshape(-1, logits.shape[-1])[chosen].float()
        labels = torch.from_numpy(np.array(batch.labels))
        total = total + torch.nn.functional.cross_entropy(flat, labels, reduction="sum") / labelled
    return total


def assert_steps_are_those_of_peft(trainer: Trainer, reference: PeftModel, steps: int) -> None:
    """Loss, gradients' norm and traffic of each step on a device that has its hidden states, and the weights after."""
    trained = {name: parameter(reference, name) for name in trainer.adapters.parameters()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        loss = loss_of(reference, trainer.batches.step_batches(step))
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0))
        optimizer.step()
        metrics = trainer.run_step()
        assert abs(metrics.loss - loss.item()) <= 1e-5 * abs(loss.item())
        assert abs(metrics.grad_norm - norm) <= 1e-4 * norm
        assert metrics.bytes_up == metrics.bytes_down == metrics.round_trips == 0
    for name, each in trainer.adapters.parameters().items():
        wanted = trained[name].detach().numpy()
        assert np.abs(each.value - wanted).max() <= 1e-4 * np.abs(wanted).max()
