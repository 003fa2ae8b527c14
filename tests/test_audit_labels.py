"""The audit's attacks on labels and on the seed: each solves a planted case, and says no where nothing was planted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import tiny_model
from torch import Tensor, nn

from dlora.cloud.audit.label_matching import match_labels
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.ends import HeadEnd, find_head
from dlora.protocol.choices import WireDtype
from dlora.protocol.wire_codecs import decode_floats, encode_floats

# tied; logit_scale, tied; logits_scaling; softcap, tied; bias
HEADS = ("llama", "qwen2", "cohere", "granite", "gemma2", "phi")
ROWS = 80
SCALE = 1 / 211  # one over the labelled tokens of the step, of which these rows are a part


@dataclass(frozen=True)
class Planted:
    """What the device knows and the server must find, of rows that crossed."""

    head: HeadEnd
    hidden: Tensor
    labels: Tensor
    grads: Tensor

    def match(self, grads: Tensor | None = None) -> Tensor:
        return match_labels(self.hidden, self.grads if grads is None else grads, self.head)

    def accuracy(self, found: Tensor) -> float:
        return float((found == self.labels).double().mean())


def across(values: Tensor, dtype: WireDtype) -> Tensor:
    return torch.from_numpy(decode_floats(encode_floats(values.numpy(), dtype)))


def plant(family: str, dtype: WireDtype = "fp32", *, confidence: float = 1.0, **changes: Any) -> Planted:
    """Random labels at the last hidden states of random tokens; every other label is the likeliest token, as a model
    that has learnt says. ``confidence`` is what hidden states are multiplied with."""
    base = BaseModel.from_model(tiny_model(family, **changes), family)
    head = find_head(base)
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(base.vocabulary_size, (4, ROWS // 4), generator=random)
    with torch.no_grad():
        hidden = across(base.last_hidden_state(base.token_embedding(ids)).flatten(0, 1) * confidence, dtype)
    labels = torch.randint(base.vocabulary_size, (ROWS,), generator=random)
    labels[::2] = head(hidden[::2]).argmax(1)
    hidden.requires_grad_()
    loss = nn.functional.cross_entropy(head(hidden), labels, reduction="sum") * SCALE
    (grads,) = torch.autograd.grad(loss, hidden)
    return Planted(head, hidden.detach(), labels, across(grads, dtype))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("family", HEADS)
def test_labels_are_read_off_gradients(family: str, dtype: WireDtype) -> None:
    planted = plant(family, dtype)
    found = planted.match()
    assert planted.accuracy(found) >= (0.99 if dtype == "int8" else 1.0)
    assert found.dtype == torch.int64


def test_the_heads_differ_as_they_should() -> None:
    """Else the test above would say nothing about bias, scale and cap."""
    heads = {family: plant(family).head for family in HEADS}
    assert heads["phi"].bias is not None
    assert heads["cohere"].logit_scale == 0.25
    assert heads["granite"].logit_scale == 0.5
    assert heads["gemma2"].softcap == 3.0
    assert heads["qwen2"].tied
    assert not heads["llama"].tied


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_labels_of_a_model_that_is_almost_certain(dtype: WireDtype) -> None:
    """Its gradients of right tokens are nearly 0: their direction is rounded away, and only the norm speaks."""
    planted = plant("llama", dtype, confidence=200.0)
    chances = torch.softmax(planted.head(planted.hidden), 1).amax(1)
    assert int((chances[::2] > 0.9999).sum()) > 10
    assert planted.accuracy(planted.match()) == 1.0


def test_labels_with_a_head_in_half_precision() -> None:
    planted = plant("llama")
    head = HeadEnd(planted.head.weight.bfloat16(), None, 1.0, None, tied=False)
    assert planted.accuracy(match_labels(planted.hidden, planted.grads, head)) > 0.95


def test_labels_of_many_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlora.cloud.audit.label_matching._SLAB_VALUES", 16 * 10)
    planted = plant("phi")
    assert planted.accuracy(planted.match()) == 1.0


def test_labels_of_one_row_and_of_none() -> None:
    planted = plant("llama")
    one = match_labels(planted.hidden[1:2], planted.grads[1:2], planted.head)
    assert one.tolist() == planted.labels[1:2].tolist()
    assert match_labels(planted.hidden[:0], planted.grads[:0], planted.head).shape == (0,)


def test_rows_of_zeros_are_a_guess() -> None:
    planted = plant("llama")
    assert planted.accuracy(planted.match(torch.zeros_like(planted.grads))) < 0.6


@pytest.mark.parametrize(("of_grads", "of_noise", "most"), [(0, 1, 0.15), (1, 10, 0.25)])
@pytest.mark.parametrize("family", HEADS)
def test_no_labels_in_random_rows_and_under_ten_times_the_noise(
    family: str, of_grads: int, of_noise: int, most: float
) -> None:
    planted = plant(family)
    noise = torch.randn(planted.grads.shape, generator=torch.Generator().manual_seed(2))
    noise *= planted.grads.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    found = planted.match(of_grads * planted.grads + of_noise * noise)
    assert planted.accuracy(found) < most
