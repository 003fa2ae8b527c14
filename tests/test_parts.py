"""The base model in parts gives what it gives as a whole, with a cache and without, of every family."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import FAMILIES, MORE_FAMILIES, tiny_model
from test_live_bytes import ZeroDeltas, exchange_of
from torch import Tensor, nn
from transformers import DynamicCache

from dlora.cloud.exchange.target_modules import running_targets, wrap_target_modules
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.layout import Layout, can_pack, lay_out
from dlora.cloud.model.parts import ModelParts
from dlora.protocol.errors import ExportError
from dlora.protocol.groups import GroupSpec

BLOCKS = 3  # with one below and one above the one in the middle
LENGTH = 9  # more than twice the windows of families that have one
PARTS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]

# Each name of MORE_FAMILIES that is not among these can be run with a cache.
WITHOUT_CACHE = ("openai-gpt", "qwen3_next", "mamba", "falcon_mamba", "falcon_h1", "jamba")


def deeper(family: str) -> BaseModel:
    """A tiny model of three blocks."""
    config = FAMILIES[family]
    changes: dict[str, Any] = {"n_layer" if "n_layer" in config else "num_hidden_layers": BLOCKS}
    if "layer_types" in config:
        changes["layer_types"] = [*config["layer_types"], config["layer_types"][0]]
    return BaseModel.from_model(tiny_model(family, **changes), family)


@pytest.fixture(scope="module", params=FAMILIES)
def parts(request: pytest.FixtureRequest) -> ModelParts:
    return ModelParts(deeper(request.param))


def embeds_of(base: BaseModel, rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randn(rows, length, base.embedding_size, generator=torch.Generator().manual_seed(seed))


def layouts(base: BaseModel) -> Iterator[tuple[str, Layout]]:
    """One row; padded; and packed where the family can."""
    yield "plain", Layout(embeds_of(base, 1), None, None, None)
    lengths = torch.tensor([3, 7, 5])
    tokens = embeds_of(base, 1, 15)[0]
    yield "padded", lay_out(tokens, lengths, may_pack=False, max_tokens=64)
    if can_pack(base):
        packed = lay_out(tokens, lengths, may_pack=True, max_tokens=15)
        assert packed.position_ids is not None
        yield "packed", packed


def run_whole(base: BaseModel, layout: Layout) -> list[Tensor]:
    """Hidden states: those that go in, those after each block, and at last those after the final norm. They are taken
    by hooks: without anything of what is tested."""
    hidden = [layout.inputs_embeds]

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden.append(output if isinstance(output, Tensor) else output[0])

    with ExitStack() as hooks:
        for block in base.block_modules:
            hooks.enter_context(block.register_forward_hook(keep))
        last = base.last_hidden_state(layout.inputs_embeds, layout.attention_mask, layout.position_ids)
    return [*hidden, last]


def assert_near(found: Tensor, wanted: Tensor, error: float) -> None:
    """To a relative error, measured against the largest value."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= error * wanted.abs().max()


@torch.no_grad()
def test_a_part_gives_the_bits_of_the_whole(parts: ModelParts) -> None:
    base = parts.base
    for _, layout in layouts(base):
        whole = run_whole(base, layout)
        given = {"attention_mask": layout.attention_mask, "position_ids": layout.position_ids}
        for begin, end in PARTS:
            assert torch.equal(parts.run(whole[begin], begin=begin, end=end, **given), whole[end])
        for begin in range(BLOCKS + 1):
            assert torch.equal(parts.run(whole[begin], begin=begin, **given), whole[-1])


def test_the_gradient_at_given_hidden_states_is_that_of_the_whole(parts: ModelParts) -> None:
    base = parts.base
    for _, layout in layouts(base):
        layout.inputs_embeds.requires_grad_()
        given = {"attention_mask": layout.attention_mask, "position_ids": layout.position_ids}
        whole = run_whole(base, layout)
        upper = torch.randn(whole[-1].shape, generator=torch.Generator().manual_seed(1))
        wanted = torch.autograd.grad(whole[-1], whole[: BLOCKS + 1], upper)
        for begin in range(BLOCKS + 1):
            hidden = whole[begin].detach().requires_grad_()
            (found,) = torch.autograd.grad(parts.run(hidden, begin=begin, **given), hidden, upper)
            assert torch.equal(found, wanted[begin])
            if begin > 0:  # and from there on downwards
                lower = parts.run(layout.inputs_embeds, end=begin, **given)
                (found,) = torch.autograd.grad(lower, layout.inputs_embeds, wanted[begin])
                assert_near(found, wanted[0], 1e-6)


@torch.no_grad()
def test_wrapped_blocks_change_no_bit_of_the_whole(parts: ModelParts) -> None:
    wrapped, plain = parts.base, deeper(parts.base.name)
    for (_, layout), (_, same) in zip(layouts(wrapped), layouts(plain), strict=True):
        assert all(map(torch.equal, run_whole(wrapped, layout), run_whole(plain, same)))


def tokens_one_by_one(append: Callable[[Tensor], Tensor], embeds: Tensor) -> Tensor:
    return torch.cat([append(embeds[:, at : at + 1]) for at in range(embeds.shape[1])], 1)


@torch.no_grad()
def test_cropped_cache_continues_as_a_shorter_one(parts: ModelParts) -> None:
    base = parts.base
    embeds, others = embeds_of(base), embeds_of(base, seed=1)
    wanted = base.last_hidden_state(embeds)
    for length in (0, 1, 3, 6, 8):
        cache = parts.new_cache()
        parts.run(torch.cat([embeds[:, :length], others[:, length:]], 1), cache=cache)
        cache.crop(length)
        assert cache.length == length
        assert_near(parts.run(embeds[:, length:], cache=cache), wanted[:, length:], 1e-5)


@torch.no_grad()
def test_parts_with_caches_of_their_own_give_the_whole(parts: ModelParts) -> None:
    """One after the other, as on two machines: prompt, single tokens, a draft that is cropped, and another."""
    base = parts.base
    embeds, draft = embeds_of(base), embeds_of(base, seed=1)
    wanted = base.last_hidden_state(embeds)
    for cuts in ([0, 1, None], [0, 2, None], [0, 1, 2, None], [0, 1, 2, 3, None]):
        pieces = list(pairwise(cuts))
        caches = [parts.new_cache(begin=begin or 0, end=end) for begin, end in pieces]

        def append(hidden: Tensor, caches=caches) -> Tensor:
            for cache in caches:
                hidden = parts.run(hidden, begin=cache.begin, end=cache.end, cache=cache)
            return hidden

        found = [append(embeds[:, :3]), tokens_one_by_one(append, embeds[:, 3:5])]
        append(draft[:, 5:8])
        for cache in caches:
            cache.crop(5)
        found.append(append(embeds[:, 5:]))
        assert_near(torch.cat(found, 1), wanted, 1e-5)


@torch.no_grad()
def test_two_threads_run_different_parts(parts: ModelParts) -> None:
    """And a third the whole, all of them again and again."""
    base = parts.base
    whole = run_whole(base, Layout(embeds_of(base), None, None, None))
    wrong: list[object] = []
    start = threading.Barrier(3)

    @torch.no_grad()
    def again(run: Callable[[], Tensor], wanted: Tensor) -> None:
        try:
            start.wait(120)
            wrong.extend("other bits" for _ in range(20) if not torch.equal(run(), wanted))
        except Exception as error:
            wrong.append(error)

    jobs = [
        (lambda: parts.run(whole[0], end=2), whole[2]),
        (lambda: parts.run(whole[1], begin=1), whole[-1]),
        (lambda: base.last_hidden_state(whole[0]), whole[-1]),
    ]
    threads = [threading.Thread(target=again, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []


@pytest.mark.parametrize("family", MORE_FAMILIES)
@torch.no_grad()
def test_more_families_run_in_parts(family: str) -> None:
    """To rounding: experts may add up in another order. With a cache or not at all."""
    base = BaseModel.from_model(tiny_model(family), family)
    parts = ModelParts(base)
    whole = run_whole(base, Layout(embeds_of(base), None, None, None))
    for begin in range(base.blocks + 1):
        assert_near(parts.run(whole[begin], begin=begin), whole[-1], 1e-6)
    if family in WITHOUT_CACHE:
        with pytest.raises(ExportError, match=rf"{family} .* cannot run with a cache of keys and values: (it|its) "):
            parts.new_cache()
        return
    embeds = embeds_of(base)
    wanted, cache = base.last_hidden_state(embeds), parts.new_cache()
    parts.run(embeds[:, :-1], cache=cache)
    cache.crop(4)
    assert_near(parts.run(embeds[:, 4:], cache=cache), wanted[:, 4:], 1e-5)


def share(base: BaseModel, giver: int, taker: int, *, forget: bool) -> None:
    """Let one block add what another was given, as blocks do that share keys and values."""
    left: dict[str, Tensor] = {}
    give, take = base.block_modules[giver].forward, base.block_modules[taker].forward

    def giving(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        left["hidden"] = hidden
        return give(hidden, *args, **kwargs)

    def taking(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return take(hidden, *args, **kwargs) + (left.pop("hidden") if forget else left["hidden"])

    base.block_modules[giver].forward, base.block_modules[taker].forward = giving, taking


@pytest.mark.parametrize("giver", [0, 1])
@pytest.mark.parametrize("forget", [False, True])
def test_blocks_that_share_more_than_hidden_states_are_refused_by_name(giver: int, forget: bool) -> None:
    """And run as before. Where the last forward's is still there, it is found out by its values."""
    base = deeper("llama")
    share(base, giver, 2, forget=forget)
    before = [block.forward for block in base.block_modules]
    reason = "block 2 fails on its own: KeyError" if forget else "block 2 takes more than the hidden states that come"
    with pytest.raises(ExportError, match=rf"llama \(llama\) cannot be run in parts: {reason}"):
        ModelParts(base)
    assert [block.forward for block in base.block_modules] == before


def test_blocks_that_see_the_embeddings_are_refused_by_name() -> None:
    """As those of Zamba do, or of Gemma 3n."""
    base = deeper("llama")
    seen: dict[str, Tensor] = {}

    def keep(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        seen["embeds"] = kwargs["inputs_embeds"]

    base.decoder.register_forward_pre_hook(keep, with_kwargs=True)
    take = base.block_modules[2].forward
    base.block_modules[2].forward = lambda *args, **kwargs: take(*args, **kwargs) + seen["embeds"]
    with pytest.raises(ExportError, match="cannot be run in parts: block 2 takes more than"):
        ModelParts(base)


def test_blocks_that_are_one_module_are_refused_by_name() -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(ExportError, match=r"mine \(llama\) cannot be run in parts: some of its blocks are one"):
        ModelParts(BaseModel.from_model(model, "mine"))


def test_a_cache_that_is_not_read_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family's own code might take a cache and do without it."""
    parts = ModelParts(deeper("llama"))
    monkeypatch.setattr(DynamicCache, "update", lambda _self, keys, values, *_args, **_kwargs: (keys, values))
    with pytest.raises(ExportError, match=r"llama \(llama\) cannot run with a cache of keys and values: it cannot"):
        parts.check_cache()


@torch.no_grad()
def test_a_forward_that_fails_leaves_the_cache_as_it_was() -> None:
    base = deeper("mistral")
    parts = ModelParts(base)
    embeds, cache = embeds_of(base), parts.new_cache()
    wanted = base.last_hidden_state(embeds)

    def fail(*_: object) -> None:
        raise MemoryError

    for length in (0, 5):
        parts.run(embeds[:, cache.length : length], cache=cache) if length else None
        failing = base.block_modules[1].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            parts.run(embeds[:, length : length + 2], cache=cache)
        failing.remove()
        assert cache.length == length
    assert_near(parts.run(embeds[:, 5:], cache=cache), wanted[:, 5:], 1e-5)


@torch.no_grad()
def test_a_cache_counts_its_bytes_and_starts_anew_with_other_rows() -> None:
    base = deeper("llama")
    parts = ModelParts(base)
    cache = parts.new_cache()
    assert cache.nbytes == 0
    parts.run(embeds_of(base, rows=2), cache=cache)
    assert cache.nbytes == BLOCKS * 2 * (2 * LENGTH * 8) * 4  # keys and values, 2 heads of 4, fp32
    cache.crop(0)
    assert cache.nbytes == 0
    embeds = embeds_of(base, rows=1)
    assert torch.equal(parts.run(embeds, cache=cache), base.last_hidden_state(embeds))


def test_inputs_that_do_not_fit_are_refused_before_running() -> None:
    base = deeper("opt")  # whose embeddings are narrower than its blocks
    parts = ModelParts(base)
    embeds, hidden = embeds_of(base), torch.zeros(1, 2, 16)
    for begin, end in ((-1, 1), (0, 0), (2, 1), (0, 4), (4, None), (3, 3)):
        with pytest.raises(ValueError, match="there is no part"):
            parts.run(hidden, begin=begin, end=end)
    with pytest.raises(ValueError, match="block 1 takes hidden states of width 16, not 8"):
        parts.run(embeds, begin=1)
    cache = parts.new_cache(begin=1)
    with pytest.raises(ValueError, match="a cache of blocks 1 to None is not one of blocks 1 to 2"):
        parts.run(hidden, begin=1, end=2, cache=cache)
    with pytest.raises(ValueError, match="neither padding nor packing"):
        parts.run(hidden, begin=1, attention_mask=torch.ones(1, 2, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="a cache of 0 tokens cannot be cropped to 1"):
        cache.crop(1)
    with pytest.raises(ValueError, match="a cache of another model"):
        ModelParts(deeper("opt")).run(hidden, begin=1, cache=cache)
    with pytest.raises(ValueError, match="there are no tokens"):
        parts.run(hidden[:, :0], begin=1)
    with pytest.raises(ValueError, match="there is no part"):
        parts.new_cache(begin=4)


@torch.no_grad()
def test_half_precision_runs_in_parts() -> None:
    base = BaseModel.from_model(tiny_model("gemma2").to(torch.bfloat16), "gemma2")
    parts = ModelParts(base)
    embeds = embeds_of(base).to(torch.bfloat16)
    assert torch.equal(parts.run(parts.run(embeds, end=1), begin=1), base.last_hidden_state(embeds))
    parts.check_cache()


class LocalLora(ZeroDeltas):
    """A device in this process, one fixed LoRA a target module."""

    def __init__(self, groups: Sequence[GroupSpec]) -> None:
        super().__init__(groups)
        torch.manual_seed(7)
        self._adapters = [
            [(torch.randn(4, group.in_features), torch.randn(each.out_features, 4)) for each in group.targets]
            for group in groups
        ]
        self._inputs: dict[int, Tensor] = {}

    def send_input(self, group: int, x: Tensor) -> None:
        self._inputs[group] = x

    def receive_outputs(self, group: int, torch_device: torch.device) -> list[Tensor]:
        return [self._inputs[group] @ a.T @ b.T / 50 for a, b in self._adapters[group]]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_parts_exchange_their_group_states(family: str) -> None:
    """As the whole model does, bit for bit; and with a cache a token at a time, as generation will."""
    base = deeper(family)
    groups = base.groups(base.targets)
    wrap_target_modules(base)
    parts = ModelParts(base)
    embeds = embeds_of(base, 1)

    def run(*cuts: tuple[int, int | None]) -> Tensor:
        hidden = embeds
        with running_targets(exchange_of(base, LocalLora(groups))):
            for begin, end in cuts:
                hidden = parts.run(hidden, begin=begin, end=end)
        return hidden

    with running_targets(exchange_of(base, LocalLora(groups))):
        whole = base.last_hidden_state(embeds)
    assert not torch.equal(whole, base.last_hidden_state(embeds))  # the adapters do something
    assert torch.equal(run((0, None)), whole)
    assert torch.equal(run((0, 1), (1, None)), whole)
    cache, rows = parts.new_cache(), []
    for first, end in ((0, LENGTH - 2), (LENGTH - 2, LENGTH - 1), (LENGTH - 1, LENGTH)):
        with running_targets(exchange_of(base, LocalLora(groups))):
            rows.append(parts.run(embeds[:, first:end], cache=cache))
    assert_near(torch.cat(rows, dim=1), whole, 1e-5)
