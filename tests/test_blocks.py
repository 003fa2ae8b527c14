"""Blocks on the device: in every family what transformers, PEFT and autograd compute, or one line that says why not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from block_bundles import REFUSED, TRIED_ALWAYS, WITHOUT_DECODE, block_bundle, block_count, prepared
from block_oracle import TorchBlocks, device_lora, graph_inputs, plain_mask, random_lora
from drawn import one_in
from families import FAMILIES, MORE_FAMILIES, VOCABULARY, tiny_model
from tiny import TinyFactory

from dlora.edge.data.batches import MicroBatch
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.answer_blocks import AnswerBlocks
from dlora.edge.model.attention_masks import Rows, attention_mask
from dlora.edge.model.blocks import DeviceBlocks
from dlora.edge.model.decode_blocks import DecodeBlocks
from dlora.export.tracing.calls import CannotRunOnDevice, sees, windows
from dlora.protocol.errors import BundleError

# Modules that give keys or values: of the last block, these alone are computed for all tokens.
OF_ALL_TOKENS = re.compile(r"(k_proj|v_proj|c_attn|qkv_proj|query_key_value|Wqkv)\.product")
# Relative to the largest magnitude. A float32 is exact to 6e-8; a block has four to seven products one after the other,
# a softmax and norms between them, and its gradients run back through all of these.
FORWARD, BACKWARD = 1e-5, 2e-5
LABELLED = np.array([2, 7, 10, 13, 16], np.int32)  # rows of the tokens that have a label
LENGTHS = (11, 6)  # longer than the windows of tiny models (4); traced with 23 and more in one
RANK, SCALING = 5, 1.5  # traced with 7

OTHERS = [family for family in (*FAMILIES, *MORE_FAMILIES) if family not in REFUSED and family not in TRIED_ALWAYS]
RUNNING = [*TRIED_ALWAYS, *(pytest.param(family, marks=pytest.mark.slow) for family in one_in(6, OTHERS))]


def sequences(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=random) for length in lengths]


def numbers(tensors: dict[str, torch.Tensor]) -> oracles.Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def assert_as_near_as_torch(found: oracles.Arrays, exact: oracles.Arrays, single: oracles.Arrays, bound: float) -> None:
    """Within ``bound`` of float64, or no further from it than torch's own float32 is."""
    assert set(found) == set(exact)
    for name, value in found.items():
        assert np.abs(exact[name]).max() > 0, f"{name} is zero: the test shows nothing"
        error = oracles.relative_error(value, exact[name])
        assert error <= max(bound, oracles.relative_error(single[name], exact[name])), name


@pytest.mark.parametrize("family", RUNNING)
def test_blocks_compute_what_peft_and_autograd_do(family: str, tiny: TinyFactory) -> None:
    bundle = Bundle.open(block_bundle(tiny, family))
    engine = OnnxEngine(bundle, 1)
    count = block_count(family)
    blocks = DeviceBlocks(bundle, engine, count, RANK)
    here = [group for group in bundle.manifest.groups if group.block >= 2 - count]
    linear = {target.name for group in here for target in group.targets}
    assert {name.rpartition(".")[0] for name in blocks.parameter_shapes} == linear
    lora = random_lora(blocks.parameter_shapes)
    spec = bundle.manifest.device_blocks
    assert spec is not None
    paths = [block.path for block in spec.blocks]
    models = {dtype: TorchBlocks(tiny_model(family), paths, lora, SCALING, dtype) for dtype in EXACT_AND_SINGLE}
    check_whole(blocks, models, lora)
    if family in WITHOUT_DECODE:
        check_refused(bundle, engine, count, lora, WITHOUT_DECODE[family])
    else:
        check_in_pieces(bundle, engine, models, lora)
        check_answers(bundle, engine, models, lora)
    check_each_graph(bundle, engine, models, lora)
    check_last_block(bundle)


EXACT_AND_SINGLE = (torch.float64, torch.float32)


def check_refused(bundle: Bundle, engine: OnnxEngine, count: int, lora: oracles.Arrays, reason: str) -> None:
    """Blocks that cannot go on from earlier tokens, for answers and for rows before these."""
    text = f"{reason}.*; use --device-blocks 0"
    with pytest.raises(BundleError, match=text):
        DecodeBlocks(bundle, engine, 1, device_lora(lora, RANK, SCALING))
    with pytest.raises(BundleError, match=text):
        AnswerBlocks(bundle, engine, count, RANK)


def check_whole(blocks: DeviceBlocks, models: dict[torch.dtype, TorchBlocks], lora: oracles.Arrays) -> None:
    """Both blocks and the final norm, on two sequences: by themselves in torch, packed on the device, for some of their
    tokens."""
    ids = sequences()
    before = models[torch.float32].run(ids, None)
    path = next(iter(before.x))
    hidden_states = before.x[path].numpy()
    grad = torch.zeros(before.last.shape)
    grad[LABELLED] = torch.randn(len(LABELLED), grad.shape[1], generator=torch.Generator().manual_seed(2))
    exact, single = (models[dtype].run(ids, grad, {path: hidden_states}) for dtype in EXACT_AND_SINGLE)
    last, kept = blocks.forward(hidden_states, np.array(LENGTHS), LABELLED, lora, SCALING)
    wanted, torchs = ({"": each.last[LABELLED].numpy()} for each in (exact, single))
    assert_as_near_as_torch({"": last}, wanted, torchs, FORWARD)
    grads = blocks.backward(grad[LABELLED].numpy(), kept, lora, SCALING)
    assert_as_near_as_torch(grads, numbers(exact.grads), numbers(single.grads), BACKWARD)


def check_answers(
    bundle: Bundle, engine: OnnxEngine, models: dict[torch.dtype, TorchBlocks], lora: oracles.Arrays
) -> None:
    """LoRA that acts from a row of each text on, or nowhere: in torch all rows, on the device the answers' alone."""
    lengths = (11, 6, 5, 7)
    ids = sequences(lengths)
    before = models[torch.float32].run(ids, None)
    path = next(iter(before.x))
    hidden_states = before.x[path].numpy()
    for most_new in (None, 4):  # first rows at once
        blocks = AnswerBlocks(bundle, engine, len(before.x), RANK, most_new)
        for acts_from, labelled in ACTING:
            batch = micro_batch(lengths, acts_from, labelled)
            grad = torch.zeros(before.last.shape)
            grad[labelled] = torch.randn(len(labelled), grad.shape[1], generator=torch.Generator().manual_seed(3))
            exact, single = (
                models[dtype].run(ids, grad, {path: hidden_states}, acts_from) for dtype in EXACT_AND_SINGLE
            )
            last, kept = blocks.forward(hidden_states, batch, lora, SCALING)
            wanted, torchs = ({"": each.last[labelled].numpy()} for each in (exact, single))
            assert_as_near_as_torch({"": last}, wanted, torchs, FORWARD)
            grads = blocks.backward(grad[labelled].numpy(), kept, lora, SCALING)
            assert_as_near_as_torch(grads, numbers(exact.grads), numbers(single.grads), BACKWARD)


# From which row on LoRA acts in each of four texts, and the rows of all of them that have a label: before answers, too.
ACTING = (
    ((7, 2, 0, 4), [2, 7, 8, 10, 13, 16, 17, 21, 26, 28]),
    ((9, 6, 3, 7), [9, 10, 16, 20, 21, 28]),  # nowhere in two
)


def micro_batch(lengths: tuple[int, ...], acts_from: tuple[int, ...], labelled: list[int]) -> MicroBatch:
    starts = np.cumsum([0, *lengths[:-1]])
    acting = [
        np.arange(start + first, start + length)
        for start, first, length in zip(starts, acts_from, lengths, strict=True)
    ]
    labels = np.array(labelled, np.int32)
    return MicroBatch(
        np.zeros(sum(lengths), np.int64), np.array(lengths, np.int32), labels, np.zeros(len(labels), np.int64),
        np.concatenate(acting).astype(np.int32),
    )  # fmt: skip


def check_in_pieces(
    bundle: Bundle, engine: OnnxEngine, models: dict[torch.dtype, TorchBlocks], lora: oracles.Arrays
) -> None:
    """One sequence a few tokens at a time, some of them taken back: in torch all of it at once."""
    ids = sequences((13,))
    before = models[torch.float32].run(ids, None)
    path = next(iter(before.x))
    hidden_states = before.x[path].numpy()
    grad = torch.ones_like(before.last)
    exact, single = (models[dtype].run(ids, grad, {path: hidden_states}).last for dtype in EXACT_AND_SINGLE)
    blocks = DecodeBlocks(bundle, engine, len(before.x), device_lora(lora, RANK, SCALING))
    found = [blocks.append(hidden_states[:5])]
    blocks.append(hidden_states[7:11])
    blocks.crop(5)
    found += [blocks.append(hidden_states[part]) for part in (slice(5, 6), slice(6, 7), slice(7, 13))]
    assert blocks.length == 13
    assert_as_near_as_torch({"": np.concatenate(found)}, {"": exact.numpy()}, {"": single.numpy()}, FORWARD)


def check_each_graph(
    bundle: Bundle, engine: OnnxEngine, models: dict[torch.dtype, TorchBlocks], lora: oracles.Arrays
) -> None:
    """Every output of every block, given the same input and a gradient of its own."""
    lengths = (4, 1, 9)
    ids = sequences(lengths)
    x = numbers(models[torch.float32].run(ids, None).x)
    exact, single = (models[dtype].run(ids, None, x) for dtype in EXACT_AND_SINGLE)
    spec = bundle.manifest.device_blocks
    assert spec is not None
    for block in spec.blocks:
        forward, backward = (bundle.manifest.graph(kind, block.graph) for kind in ("block_forward", "block_backward"))
        others = {"x": x[block.path], "grad": exact.grad_y[block.path].float().numpy()}
        mine = {name: value for name, value in lora.items() if name.startswith(f"{block.path}.")}
        y, *kept = engine.load("block_forward", block.graph)(
            graph_inputs(bundle, block, forward, lengths, mine, SCALING, others)
        )
        assert_as_near_as_torch({"": y}, {"": exact.y[block.path].numpy()}, {"": single.y[block.path].numpy()}, FORWARD)
        others |= dict(zip([tensor.name for tensor in forward.outputs[1:]], kept, strict=True))
        grad_x, *grads = engine.load("block_backward", block.graph)(
            graph_inputs(bundle, block, backward, lengths, mine, SCALING, others)
        )
        names = [f"{block.path}.{tensor.name.removeprefix('grad.')}" for tensor in backward.outputs[1:]]
        found = dict(zip(["", *names], [grad_x, *grads], strict=True))
        wanted, torchs = (
            numbers({"": each.grad_x[block.path], **{name: each.grads[name] for name in mine}})
            for each in (exact, single)
        )
        assert_as_near_as_torch(found, wanted, torchs, BACKWARD)


def check_last_block(bundle: Bundle) -> None:
    """Where a new version of a family's code did something that has no rule, its last block would be computed whole."""
    spec = bundle.manifest.device_blocks
    assert spec is not None
    outputs = bundle.manifest.graph("last_block_forward", spec.blocks[-1].graph).outputs
    products = {tensor.name: tensor.shape[0] for tensor in outputs if tensor.name.endswith(".product")}
    assert products
    of_all = {name for name, size in products.items() if size == "positions"}
    assert all(OF_ALL_TOKENS.search(name) for name in of_all), products
    assert "labelled" in {size for tensor in outputs for size in tensor.shape}


@pytest.mark.parametrize("family", REFUSED)
def test_family_without_blocks_for_a_device_is_refused(family: str) -> None:
    with pytest.raises(CannotRunOnDevice, match=REFUSED[family]) as caught:
        prepared(family)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("lengths", [(1,), (7,), (1, 1, 1), (9, 3), (2, 70, 5)])
def test_masks_of_device_and_export_are_one(lengths: tuple[int, ...], window: int | None) -> None:
    rows = Rows.of(np.array(lengths, np.int32))
    found = attention_mask(rows, rows, window)
    assert (found.dtype, found.shape) == (np.float32, (1, 1, sum(lengths), sum(lengths)))
    assert np.array_equal(found[0, 0], plain_mask(lengths, window))
    assert np.array_equal(found[0, 0] == 0, sees(torch.tensor(lengths), window).numpy())


@pytest.mark.parametrize(
    ("family", "wanted"),
    [("llama", (None, None)), ("gemma3_text", (4, None)), ("mistral", (4, 4)), ("gemma2", (4, None))],
)
def test_windows_are_those_of_the_family(family: str, wanted: Any, tiny: TinyFactory) -> None:
    assert windows(tiny(family).base) == wanted
    if family in TRIED_ALWAYS:
        spec = Bundle.open(block_bundle(tiny, family)).manifest.device_blocks
        assert spec is not None
        assert tuple(block.window for block in spec.blocks) == wanted


def files_of(bundle: Path) -> set[str]:
    return {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}


def test_blocks_share_graphs_and_tables(tiny: TinyFactory) -> None:
    """Two blocks of llama: one graph of each kind, one cosine, one sine, and weights of their own."""
    bundle = block_bundle(tiny)
    spec = Bundle.open(bundle).manifest.device_blocks
    assert spec is not None
    assert spec.max_length == 64
    first, second = spec.blocks
    assert (first.graph, first.tables) == (second.graph, second.tables)
    assert set(first.weights) == set(second.weights)
    assert not set(first.weights.values()) & set(second.weights.values())
    files = files_of(bundle)
    assert sum(name.startswith("blocks/tables/") for name in files) == 2
    assert sum(name.startswith("graphs/block_") for name in files) == 3
