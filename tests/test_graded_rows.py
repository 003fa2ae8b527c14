"""Where adapters act on answers only, gradients of rows before them are left out, and the server sends the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import conversations
import numpy as np
import pytest
import torch
from families import FAMILIES, MORE_FAMILIES, tiny_model
from torch import Tensor

from dlora.cloud.exchange import target_modules
from dlora.cloud.exchange.session_model import SessionModel
from dlora.cloud.exchange.target_modules import wrap_target_modules
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.layout import can_pack, is_near
from dlora.cloud.serving.micro_batch import ServerMicroBatch
from dlora.protocol.groups import GroupSpec
from dlora.protocol.micro_batch import GroupStates
from dlora.protocol.tensors import WireTensor

LENGTHS = (9, 5, 3, 7, 4)
FIRSTS = (6, 0, 2, 3, 4)
"""Where adapters begin to act in each text: at its first token in one, and in the last one nowhere."""
LABELLED = (7, 8, 10, 12, 16, 20, 23)


@dataclass
class FixedDevice:
    """A device whose deltas and gradients are drawn by their group; it keeps what the server sends."""

    groups: Sequence[GroupSpec]
    rows: int
    sent: dict[str, Tensor] = field(default_factory=dict)

    def _draw(self, seed: int, rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.1

    def send_input(self, group: int, x: Tensor) -> None:
        self.sent[f"input {group}"] = x.detach()

    def receive_outputs(self, group: int, torch_device: torch.device) -> list[Tensor]:
        targets = self.groups[group].targets
        return [self._draw(97 * group + index, self.rows, each.out_features) for index, each in enumerate(targets)]

    def send_grads(self, group: int, grads: Sequence[Tensor], *, answer: bool) -> None:
        self.sent |= {f"gradient {group}.{index}": grad for index, grad in enumerate(grads)}

    def receive_input_grad(self, group: int, torch_device: torch.device) -> Tensor:
        return self._draw(10_000 + group, self.rows, self.groups[group].in_features)

    def send_labelled(self, hidden_states: Tensor, gradients: int) -> None:
        self.sent["last hidden states"] = hidden_states.detach()

    def receive_labelled_grad(self, like: Tensor) -> Tensor:
        return self._draw(77, *like.shape)


def sent_by_server(base: BaseModel, states: GroupStates, *, packs: bool, leaves_out: bool) -> dict[str, Tensor]:
    """All that a server sends of a micro-batch, forward and backward."""
    groups = base.groups(base.targets)
    model = SessionModel(base, conversations.open_session(groups=groups))
    for _ in groups:
        model.add(())
    random = np.random.default_rng(5)
    starts = np.cumsum((0, *LENGTHS[:-1]))
    acting = [start + row for start, *pair in zip(starts, FIRSTS, LENGTHS, strict=True) for row in range(*pair)]
    begun = conversations.embeddings_of(
        LENGTHS,
        base.embedding_size,
        hidden_states=WireTensor("fp32", random.standard_normal((sum(LENGTHS), base.embedding_size), np.float32)),
        crossing_positions=WireTensor.from_ints(acting),
        label_positions=WireTensor.from_ints(LABELLED),
    )
    run = ServerMicroBatch(model, begun, states, max_tokens=64, packs=packs)
    assert run.graded is not None
    assert len(run.graded) == sum(LENGTHS) - sum(FIRSTS)
    if not leaves_out:
        run.graded = None
    device = FixedDevice(groups, len(acting))
    run.run(device)  # type: ignore[arg-type]  # as much of a device as it asks for
    return device.sent


def model_of(family: str) -> BaseModel:
    base = BaseModel.from_model(tiny_model(family), family)
    wrap_target_modules(base)
    return base


@pytest.mark.parametrize("family", FAMILIES | MORE_FAMILIES)
def test_what_is_left_out_changes_nothing(family: str) -> None:
    base = model_of(family)
    every = range(len(base.groups(base.targets)))
    states = GroupStates(tuple(every), frozenset(every[1:]))
    for packs in {False, can_pack(base)}:
        found, wanted = (sent_by_server(base, states, packs=packs, leaves_out=each) for each in (True, False))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert is_near(found[name], tensor), name


def test_each_frozen_module_above_an_adapter_leaves_rows_out(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    take = target_modules.chosen_rows

    def chosen_rows(padded: Tensor, rows: Tensor) -> Tensor:
        taken.append(len(rows))
        return take(padded, rows)

    base = model_of("llama")
    groups = base.groups(base.targets)
    lowest = len(groups) // 2
    monkeypatch.setattr(target_modules, "chosen_rows", chosen_rows)
    sent_by_server(base, GroupStates((lowest,), frozenset((lowest,))), packs=True, leaves_out=True)
    above = sum(len(group.targets) for group in groups[lowest + 1 :])
    assert taken == [sum(LENGTHS) - sum(FIRSTS)] * above
