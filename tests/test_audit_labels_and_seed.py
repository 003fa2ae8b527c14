"""The audit's attacks on labels and on the seed: each solves a planted case, and says no where nothing was planted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model
from torch import Tensor, nn

from dlora.cloud.audit.label_matching import MatchedLabels, match_labels
from dlora.cloud.audit.seed_guessing import (
    candidates_of,
    draw_lora_A,
    guess_seed,
    least_share,
    server_seed_of,
)
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.ends import HeadEnd, find_head
from dlora.edge.adapters.units import AdapterSet
from dlora.edge.seeds import Seed, draw_seed, seed_for_server
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.choices import WireDtype
from dlora.protocol.groups import GroupSpec, TargetSpec
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

    def match(self, grads: Tensor | None = None) -> MatchedLabels:
        return match_labels(self.hidden, self.grads if grads is None else grads, self.head)

    def accuracy(self, found: MatchedLabels) -> float:
        return float((found.labels == self.labels).double().mean())


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
    assert found.labels.dtype == torch.int64
    assert found.scale == pytest.approx(SCALE, rel=1e-2 if dtype == "int8" else 1e-3)
    assert float(found.residuals.median()) < {"fp32": 1e-4, "fp16": 2e-3, "int8": 3e-2}[dtype]


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
    assert one.labels.tolist() == planted.labels[1:2].tolist()
    none = match_labels(planted.hidden[:0], planted.grads[:0], planted.head)
    assert (none.labels.shape, none.residuals.shape, none.scale) == ((0,), (0,), 0.0)


def test_rows_of_zeros_are_a_guess() -> None:
    planted = plant("llama")
    found = planted.match(torch.zeros_like(planted.grads))
    assert found.scale == 0.0
    assert found.residuals.tolist() == [1.0] * ROWS


@pytest.mark.parametrize("family", HEADS)
def test_no_labels_in_random_rows(family: str) -> None:
    planted = plant(family)
    noise = torch.randn(planted.grads.shape, generator=torch.Generator().manual_seed(2))
    grads = noise * planted.grads.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    found = planted.match(grads)
    assert planted.accuracy(found) < 0.15
    assert float(found.residuals.median()) > 0.5


@pytest.mark.parametrize("family", HEADS)
def test_no_labels_under_ten_times_the_noise(family: str) -> None:
    planted = plant(family)
    noise = torch.randn(planted.grads.shape, generator=torch.Generator().manual_seed(2))
    grads = planted.grads + 10 * noise * planted.grads.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    found = planted.match(grads)
    assert planted.accuracy(found) < 0.25
    assert float(found.residuals.median()) > 0.5


R = 4
GROUPS = tuple(
    GroupSpec(block, width, tuple(TargetSpec(f"model.layers.{block}.{name}", out) for name, out in targets))
    for block in range(2)
    for width, targets in (
        (48, (("self_attn.q_proj", 48), ("self_attn.k_proj", 24), ("self_attn.v_proj", 24))),
        (56, (("self_attn.o_proj", 48),)),
        (48, (("mlp.gate_proj", 80), ("mlp.up_proj", 80))),
        (80, (("mlp.down_proj", 48),)),
    )
)
NAMES = [target.name for group in GROUPS for target in group.targets]


def adapters_of(seed: Seed, kind: str = "lora") -> AdapterSet:
    return AdapterSet.create(AdapterSpec(kind, R), GROUPS, scaling=2.0, seed=seed, unit="block", kill_every=1)


def lora_A_of(seed: Seed) -> dict[str, np.ndarray]:
    parameters = adapters_of(seed).parameters()
    return {name: parameters[f"{name}.lora_A"].value for name in NAMES}


def products_after(seed: Seed, steps: int, noise: float = 0.0) -> dict[str, Tensor]:
    """``scaling · B · A`` after so many steps, each of which moves A by the learning rate, as AdamW does."""
    random = np.random.default_rng(3)
    products = {}
    for name, lora_a in lora_A_of(seed).items():
        moved = lora_a + 1e-3 * steps * np.sign(random.normal(size=lora_a.shape))
        width = next(target.out_features for group in GROUPS for target in group.targets if target.name == name)
        product = 2.0 * random.normal(0, 1e-3 * steps, (width, R)) @ moved
        product += noise * np.linalg.norm(product) * random.normal(size=product.shape) / product.size**0.5
        products[name] = torch.from_numpy(product).float()
    return products


@pytest.mark.parametrize("seed", [(7,), (0,), (2**32 - 1,), (1, 2, 3, 4)])
@pytest.mark.parametrize("kind", ["lora", "ffa"])
def test_the_draw_is_the_devices_bit_for_bit(seed: Seed, kind: str) -> None:
    if kind == "lora":
        real = lora_A_of(seed)
    else:
        real = {each.name: each.adapter_state[0].data for each in adapters_of(seed, kind).groups}
    drawn = draw_lora_A(seed, GROUPS, kind, R)
    assert list(drawn) == list(real)
    for name, lora_a in drawn.items():
        assert lora_a.dtype == np.float32
        assert np.array_equal(lora_a.view(np.uint32), real[name].view(np.uint32))


def test_a_bottleneck_has_no_drawn_lora_A() -> None:
    with pytest.raises(ValueError, match="bottleneck"):
        draw_lora_A((7,), GROUPS, "bottleneck", R)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("steps", [1, 20])
def test_a_chosen_seed_is_found_by_the_products(steps: int, noise: float) -> None:
    products = products_after((7,), steps, noise)
    found = guess_seed(range(100), products, GROUPS, R)
    assert found is not None
    assert found.seed == 7
    for name, real in lora_A_of((7,)).items():
        assert np.array_equal(found.lora_A[name], real)
        product = products[name].numpy()
        error = np.linalg.norm(found.lora_B[name] @ real - product) / np.linalg.norm(product)
        assert error**2 == pytest.approx(1 - found.shares[name], abs=1e-4)
        assert found.shares[name] > 0.7


def test_the_product_of_any_module_will_do() -> None:
    """Its A lies somewhere in the middle of what is drawn, and the others are not needed."""
    for name, product in products_after((7,), 5).items():
        others = {other: torch.zeros_like(each) for other, each in products_after((8,), 5).items()}
        found = guess_seed(range(100), {**others, name: product}, GROUPS, R)
        assert found is not None
        assert (found.seed, found.shares[name] > 0.9) == (7, True)


@pytest.mark.parametrize("seed", [draw_seed(), (100,), (7, 0, 0, 0)], ids=["random", "outside", "more words"])
def test_a_seed_that_is_no_candidate_is_not_found(seed: Seed) -> None:
    products = products_after(seed, 1)
    assert guess_seed(range(100), products, GROUPS, R) is None
    assert guess_seed(range(10_000), {}, GROUPS, R, server_seed=seed_for_server((10_000, *seed))) is None


def test_noise_is_no_adapter() -> None:
    random = torch.Generator().manual_seed(4)
    noise = {name: torch.randn(each.shape, generator=random) for name, each in products_after((7,), 1).items()}
    assert guess_seed(range(100), noise, GROUPS, R) is None
    assert guess_seed(range(100), {}, GROUPS, R) is None
    as_wide = {name: each for name, each in products_after((7,), 1).items() if each.shape[1] == 48}
    assert guess_seed(range(100), as_wide, GROUPS, 48) is None


def test_the_servers_seed_tells_which_guess_is_right() -> None:
    """It crosses in open_session, so a chosen seed is found before the first step."""
    for seed in ((7,), (2**32 - 1,), (1, 2, 3, 4)):
        assert server_seed_of(seed) == seed_for_server(seed) != seed[0]
    assert list(candidates_of(seed_for_server((7,)), range(1000))) == [7]
    assert list(candidates_of(seed_for_server((1000,)), range(1000))) == []
    assert list(candidates_of(seed_for_server((7, 0, 0, 0)), range(1000))) == []
    assert list(candidates_of(seed_for_server(draw_seed()))) == []
    found = guess_seed(range(1000), {}, GROUPS, R, server_seed=seed_for_server((7,)))
    assert found is not None
    assert (found.seed, found.lora_B, found.shares) == (7, {}, {})
    assert all(np.array_equal(found.lora_A[name], real) for name, real in lora_A_of((7,)).items())


def test_products_must_confirm_what_the_servers_seed_says() -> None:
    server_seed = seed_for_server((7,))
    confirmed = guess_seed(range(1000), products_after((7,), 3), GROUPS, R, server_seed=server_seed)
    assert confirmed is not None
    assert confirmed.seed == 7
    assert guess_seed(range(1000), products_after((8,), 3), GROUPS, R, server_seed=server_seed) is None


def test_how_much_a_lora_A_must_explain() -> None:
    assert least_share(8, 576, 10_000) == pytest.approx(0.12, abs=0.01)
    assert 0.9 < least_share(4, 16, 100) < least_share(4, 16, 10_000) < 1
    # Of wrong ones none passes, even where a space of 4 dimensions is a quarter of all.
    random = np.random.default_rng(0)
    shares = random.beta(2, 6, 100_000)
    assert np.mean(shares > 5 / 8) > 1e-3  # half way from chance to 1 would let these pass
    assert np.mean(shares > least_share(4, 16, 1)) < 1e-4
