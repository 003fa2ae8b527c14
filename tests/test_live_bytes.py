"""The estimate of a micro-batch's live bytes, against what autograd really saves for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny_model
from torch import Tensor

from dlora.cloud.exchange.exchange import MicroBatchExchange
from dlora.cloud.exchange.kinds import SITE_KINDS
from dlora.cloud.exchange.target_modules import running_targets, wrap_target_modules
from dlora.cloud.model import live_bytes as live_bytes_module
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.layout import Layout, can_pack, lay_out
from dlora.cloud.model.live_bytes import LiveBytes, _order_of_calls, _TensorByteCounter, default_live_limit
from dlora.cloud.model.low_bits import hold_in_low_bits
from dlora.cloud.model.parts import ModelParts
from dlora.cloud.model.row_blocks import DividedTexts, RowBlocks
from dlora.cloud.serving.server import LEAST_TOKENS, MOST_TOKENS, default_max_tokens, default_window
from dlora.protocol.choices import WeightFormat
from dlora.protocol.counting import cut_to_fit
from dlora.protocol.device_memory import USUAL_TOKENS
from dlora.protocol.errors import ExportError
from dlora.protocol.groups import GroupSpec
from dlora.protocol.limits import USUAL_WINDOW

# Refusing what would have fit is a nuisance, admitting what does not is an outage.
AT_LEAST, AT_MOST = 0.9, 1.5

LENGTHS = {"alone": [23], "equal": [20, 20], "close": [18, 21, 20], "far apart": [2, 30, 3, 1]}


class ZeroDeltas:
    """A device whose adapters are all zero."""

    def __init__(self, groups: Sequence[GroupSpec]) -> None:
        self.groups = groups
        self.tokens = 0

    def send_input(self, group: int, x: Tensor) -> None:
        self.tokens = len(x)

    def receive_outputs(self, group: int, torch_device: torch.device) -> list[Tensor]:
        return [torch.zeros(self.tokens, target.out_features) for target in self.groups[group].targets]

    def send_grads(self, group: int, grads: Sequence[Tensor], *, answer: bool) -> None:
        raise AssertionError("no backward pass here")

    def receive_input_grad(self, group: int, torch_device: torch.device) -> Tensor:
        raise AssertionError("no backward pass here")


def exchange_of(
    base: BaseModel, device: ZeroDeltas, trained: Collection[int] = (), rows: Tensor | None = None
) -> MicroBatchExchange:
    """Of a micro-batch in which all of the device's groups are live."""
    groups = device.groups
    sites, live = [SITE_KINDS["lora"](group, ()) for group in groups], range(len(groups))
    return MicroBatchExchange(device, base, groups, sites, live=live, trained=trained, given={}, rows=rows)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models only lose by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def base_model(family: str, weight_format: WeightFormat = "full", **changes: object) -> BaseModel:
    model = tiny_model(family, **changes)
    hold_in_low_bits(model, weight_format)
    base = BaseModel.from_model(model, family, weight_format)
    wrap_target_modules(base)
    return base


def layout_of(base: BaseModel, lengths: list[int], max_tokens: int = 10**6) -> Layout:
    tokens = torch.randn(sum(lengths), base.embedding_size, generator=torch.Generator().manual_seed(1))
    return lay_out(tokens, torch.tensor(lengths), may_pack=can_pack(base), max_tokens=max_tokens)


def bytes_saved(
    base: BaseModel, groups: Sequence[GroupSpec], run: Callable[[], Tensor], rows: Tensor | None, trained: set[int]
) -> int:
    """What autograd saves in a micro-batch as the executor runs it, weights aside."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*base.model.parameters(), *base.model.buffers())}
    saved: list[torch.UntypedStorage] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage())
        return tensor.detach()

    exchange = exchange_of(base, ZeroDeltas(groups), trained, rows)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), running_targets(exchange):
        assert run().requires_grad
    unique = {storage.data_ptr(): storage.nbytes() for storage in saved if storage.data_ptr() not in weights}
    return sum(unique.values())


LOW_BITS: list[tuple[str, WeightFormat]] = [("llama", "int8"), ("llama", "nf4"), ("phi3", "int8"), ("stablelm", "nf4")]
FORMATS: list[tuple[str, WeightFormat]] = [*((family, "full") for family in sorted(FAMILIES)), *LOW_BITS]


@pytest.mark.parametrize(("family", "weight_format"), FORMATS)
def test_the_estimate_is_near_what_autograd_saves(family: str, weight_format: WeightFormat) -> None:
    base = base_model(family, weight_format)
    live_bytes = LiveBytes.measure(base)
    groups = base.groups(base.targets)
    ratios = {}
    for name, lengths in LENGTHS.items():
        layout = layout_of(base, lengths)
        for lowest in (0, len(groups) // 2):
            given = layout.inputs_embeds, layout.attention_mask, layout.position_ids
            run = partial(base.last_hidden_state, *given)
            wanted = bytes_saved(base, groups, run, layout.rows, {lowest, len(groups) - 1})
            ratios[name, lowest] = live_bytes.graph(layout, groups[lowest]) / wanted
    assert min(ratios.values()) >= AT_LEAST, ratios
    assert max(ratios.values()) <= AT_MOST, ratios


@pytest.mark.parametrize(("family", "weight_format"), FORMATS)
def test_evaluation_estimate_is_near_the_peak_of_its_forward_pass(family: str, weight_format: WeightFormat) -> None:
    """Where weights are made anew, they are larger than what a few tokens take."""
    changes = {} if weight_format == "full" else {"hidden_size": 64, "intermediate_size": 128}
    base = base_model(family, weight_format, **changes)
    live_bytes = LiveBytes.measure(base)
    ratios, groups = {}, base.groups(base.targets)
    for name, lengths in LENGTHS.items():
        layout = layout_of(base, lengths)
        assert live_bytes.graph(layout, None) == 0
        with (
            torch.no_grad(),
            running_targets(exchange_of(base, ZeroDeltas(groups), rows=layout.rows)),
            _order_of_calls(base) as order,
            _TensorByteCounter(base, order) as alive,
        ):
            base.last_hidden_state(layout.inputs_embeds, layout.attention_mask, layout.position_ids)
        most = max(total for totals in alive.totals for _, total in totals)
        ratios[name] = live_bytes.estimate(layout, None) / (most + 2 * layout.inputs_embeds.nbytes)
    assert min(ratios.values()) >= AT_LEAST, ratios
    assert max(ratios.values()) <= AT_MOST, ratios


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_estimate_of_last_rows_is_near_what_autograd_saves(family: str) -> None:
    base = base_model(family)
    groups, blocks = base.groups(base.targets), RowBlocks(ModelParts(base))
    live_bytes = LiveBytes.measure(base, blocks)
    ratios = {}
    for texts in (DividedTexts((30, 12, 21), (25, 9, 8)), DividedTexts((40,), (4,)), DividedTexts((9, 9), (0, 0))):
        layout = layout_of(base, list(texts.lengths))
        for lowest in (0, len(groups) // 2):
            block = groups[lowest].block
            last_rows = blocks.begin(torch.randn(sum(texts.lengths), base.embedding_size), texts, block)
            saved = bytes_saved(base, groups, last_rows.run, None, {lowest, len(groups) - 1})
            wanted = saved + last_rows.kept_bytes(block)
            ratios[texts.firsts, lowest] = live_bytes.graph(layout, groups[lowest], texts) / wanted
    assert min(ratios.values()) >= AT_LEAST, ratios
    assert max(ratios.values()) <= 1.25 * AT_MOST, ratios  # copies of several texts are counted generously


def test_training_takes_the_graph_on_top() -> None:
    base = base_model("llama")
    live_bytes, layout = LiveBytes.measure(base), layout_of(base, [9, 4])
    for group in base.groups(base.targets):
        graph = live_bytes.graph(layout, group)
        assert graph > 0
        assert live_bytes.estimate(layout, group) == live_bytes.estimate(layout, None) + graph


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_no_micro_batch_takes_more_than_the_largest(family: str) -> None:
    base = base_model(family)
    live_bytes, packs, longest = LiveBytes.measure(base), can_pack(base), base.max_sequence_length
    generator = np.random.default_rng(0)
    group = base.groups(base.targets)[0]
    for limit in (16, 64, 200):
        largest = live_bytes.largest(limit, limit if packs else longest)
        for _ in range(30):
            lengths = generator.integers(1, min(limit, longest) + 1, limit)
            run = cut_to_fit(lengths.tolist(), max_tokens=limit, packs=packs)[0]
            layout = layout_of(base, lengths[run.start : run.stop].tolist(), limit)
            assert live_bytes.estimate(layout, group) <= largest
            assert layout.inputs_embeds.shape[:2].numel() <= limit


def test_the_default_of_max_tokens_leaves_room_for_two() -> None:
    base = base_model("llama")
    live_bytes, longest = LiveBytes.measure(base), base.max_sequence_length
    assert default_max_tokens(live_bytes, longest, None) == MOST_TOKENS
    assert default_max_tokens(live_bytes, longest, 10**12) == MOST_TOKENS
    assert default_max_tokens(live_bytes, longest, 1) == LEAST_TOKENS
    wanted = 10 * LEAST_TOKENS
    most = live_bytes.largest(wanted, longest)
    assert default_max_tokens(live_bytes, longest, 2 * most) == wanted
    assert default_max_tokens(live_bytes, longest, 2 * most - 1) == wanted - LEAST_TOKENS


def test_the_default_window_is_what_memory_admits() -> None:
    base = base_model("llama")
    live_bytes, longest = LiveBytes.measure(base), base.max_sequence_length
    one = live_bytes.largest(min(USUAL_TOKENS, longest), longest)
    found = [default_window(live_bytes, longest, limit) for limit in (None, 1, one, 2 * one - 1, 2 * one, 100 * one)]
    assert found == [USUAL_WINDOW, 1, 1, 1, 2, USUAL_WINDOW]


def test_default_live_limit_is_half_of_what_the_model_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_model("llama")
    weights = sum(parameter.nbytes for parameter in base.model.parameters())
    monkeypatch.setattr(live_bytes_module, "machine_bytes", lambda: 10**9 + weights)
    assert default_live_limit(base) == 10**9 // 2
    monkeypatch.setattr(live_bytes_module, "machine_bytes", lambda: weights)
    assert default_live_limit(base) == 64 << 20


@pytest.mark.parametrize(("implementation", "quadratic"), [("sdpa", False), ("eager", True)])
def test_attention_that_keeps_its_scores_grows_with_the_square(implementation: str, quadratic: bool) -> None:
    base = base_model("llama", attn_implementation=implementation)
    live_bytes = LiveBytes.measure(base)
    group = base.groups(base.targets)[0]
    short, long = (live_bytes.estimate(layout_of(base, [length]), group) for length in (1000, 2000))
    assert (long > 3 * short) == quadratic


def test_estimate_uses_the_width_of_bfloat16() -> None:
    model = tiny_model("llama")
    single = LiveBytes.measure(BaseModel.from_model(model, "llama"))
    half_base = BaseModel.from_model(model.to(torch.bfloat16), "llama")
    half = LiveBytes.measure(half_base)
    group, layout = half_base.groups(half_base.targets)[0], layout_of(half_base, [30])
    assert 0.4 < half.estimate(layout, group) / single.estimate(layout, group) < 0.8  # norms compute in float32


def test_the_measurement_changes_nothing() -> None:
    base = base_model("gemma2")
    layout = layout_of(base, [7, 3])
    with torch.no_grad():
        before = base.last_hidden_state(layout.inputs_embeds, layout.attention_mask)
    state = torch.get_rng_state()
    LiveBytes.measure(base)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base.model.parameters())
    assert not any(target.module._forward_pre_hooks for target in base.targets.values())
    with torch.no_grad():
        assert torch.equal(base.last_hidden_state(layout.inputs_embeds, layout.attention_mask), before)


def test_the_measurement_keeps_nothing_when_the_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_model("llama")

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(list(base.targets.values())[-1].module, "forward", fail)
    with pytest.raises(ExportError, match="out of memory"):
        LiveBytes.measure(base)
    assert not any(target.module._forward_pre_hooks for target in base.targets.values())
