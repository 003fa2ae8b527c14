"""Training through blocks on the device: twenty AdamW steps are torch's, on both engines and for every way to store
weights; and what such a run may ask for that cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import torch
from answers import INVOCATION, random_answers
from block_bundles import WITHOUT_DECODE, block_bundle, stored_as, with_programs
from block_oracle import TorchBlocks, random_lora
from drawn import one_in
from executorch_bundle import NEEDED
from families import VOCABULARY, tiny_model
from tiny import TinyFactory
from transformers.pytorch_utils import Conv1D

from dlora.edge.adapters.kind import Parameter
from dlora.edge.adapters.lora import LoraGroup, LoraModule
from dlora.edge.adapters.units import AdapterSet, Unit
from dlora.edge.data.batches import pack
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import OF_BLOCKS, Engine
from dlora.edge.engine.executorch_engine import ExecutorchEngine
from dlora.edge.engine.onnx_engine import OnnxEngine, _is_large
from dlora.edge.model.answer_blocks import AnswerBlocks
from dlora.edge.model.blocks import DeviceBlocks
from dlora.edge.model.decode_blocks import DecodeBlocks
from dlora.edge.model.device_lora import DeviceLora
from dlora.edge.training.optimizer import AdamW
from dlora.edge.training.resolved import ChosenOptimizer
from dlora.export import to_executorch
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.errors import BundleError, DataError, UsageError
from dlora.protocol.groups import GroupSpec, TargetSpec

# Each of twenty steps leaves torch's path by what its gradients differ, some 1e-6 of them, times the learning rate; and
# by whole steps of AdamW for gradients that are nearly nothing: at 1e-2 torch's own float32 leaves float64's by 2.5e-4.
STEPS, PATH = 20, 1e-4
LENGTHS = np.array([8, 5], np.int32)
LABELLED = np.array([1, 3, 4, 5, 6, 7, 9, 10, 11, 12], np.int32)  # rows of the tokens that have a label
RANK, SCALING = 3, 2.0
CONFIG = ChosenOptimizer(lr=1e-3, weight_decay=0.05, max_grad_norm=0.0, schedule="constant", warmup=0.0)
FEW_TOKENS = 24  # of a micro-batch that programs made here take
OTHERS = [
    (family, dtype)
    for dtype in ("fp32", "fp16", "int8", "int4")
    for family in ("gpt2", "gemma2", "mpt", "phi3")
    if (family, dtype) not in {("gemma2", "int4"), ("mpt", "int4")}
]


def adapters_of(lora: dict[str, np.ndarray]) -> AdapterSet:
    """One unit of all modules, as a device steps it."""
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in lora))
    modules = [
        LoraModule(name, *(Parameter.of(lora[f"{name}.{half}"].copy()) for half in ("lora_A", "lora_B")))
        for name in names
    ]
    group = GroupSpec(0, 1, (TargetSpec("one", 1),))
    return AdapterSet(AdapterSpec(), [group], [LoraGroup(modules, 1.0)], [Unit((0,))], scaling=1.0, kill_every=1)


def sequences() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=random) for length in LENGTHS.tolist()]


def train_on_the_device(
    bundle: Bundle, engine: Engine, hidden_states: np.ndarray, target: np.ndarray, lora: dict[str, np.ndarray]
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses, half a squared distance from ``target``, and what is learnt."""
    blocks, adapters, losses = device_blocks(bundle, engine), adapters_of(lora), []
    optimizer = AdamW(engine, CONFIG, STEPS)
    for step in range(STEPS):
        values = {name: parameter.value for name, parameter in adapters.parameters().items()}
        last, kept = blocks.forward(hidden_states, LENGTHS, LABELLED, values, SCALING)
        losses.append(float(np.square(last - target, dtype=np.float64).sum() / 2))
        grads = blocks.backward(last - target, kept, values, SCALING)
        assert set(grads) == set(values)
        for name, parameter in adapters.parameters().items():
            parameter.grad = grads[name]
        optimizer.step(adapters, lr=optimizer.lr(step))
    return losses, {name: parameter.value for name, parameter in adapters.parameters().items()}


def device_blocks(bundle: Bundle, engine: Engine) -> DeviceBlocks:
    """All that a bundle has."""
    spec = bundle.manifest.device_blocks
    assert spec is not None
    return DeviceBlocks(bundle, engine, len(spec.blocks), RANK)


def check_twenty_steps(bundle: Bundle, engine: Engine, family: str) -> None:
    """Against a model that has the very weights which the device has."""
    spec = bundle.manifest.device_blocks
    assert spec is not None
    model = tiny_model(family)
    with torch.no_grad():
        for block in spec.blocks:
            weights = {name: bundle.weight(file) for name, file in block.weights.items()}
            for name, module in model.get_submodule(block.path).named_modules():
                if f"{name}.weight" in weights:
                    value = stored_as(weights, name)
                    module.weight.copy_(value.T if isinstance(module, Conv1D) else value)
    lora = random_lora(device_blocks(bundle, engine).parameter_shapes)
    torchs = TorchBlocks(model, [block.path for block in spec.blocks], lora, SCALING)
    ids = sequences()
    hidden_states = torchs.run(ids, None).x[spec.blocks[0].path].numpy()
    size = len(LABELLED), bundle.manifest.base_model.hidden_size
    target = np.random.default_rng(4).standard_normal(size, np.float32)
    losses, found = train_on_the_device(bundle, engine, hidden_states, target, lora)
    optimizer = torch.optim.AdamW(torchs.parameters.values(), lr=CONFIG.lr, weight_decay=CONFIG.weight_decay)
    for loss in losses:
        optimizer.zero_grad()
        wanted = (torchs.last_hidden_states(ids)[LABELLED] - torch.from_numpy(target)).square().sum() / 2
        wanted.backward()
        optimizer.step()
        assert loss == pytest.approx(wanted.item(), rel=PATH)
    assert losses[-1] < 0.9 * losses[0]
    for name, value in found.items():
        assert oracles.relative_error(value, torchs.parameters[name].detach().numpy()) <= PATH, name


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "fp32"),
        ("llama", "int4"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            # Of int8 on the days of tests/test_blocks_export.py.
            for each in (*one_in(2, (("llama", "int8"), ("llama", "fp16"))), *one_in(5, OTHERS))
        ),
    ],
)
def test_twenty_steps_match_torch(family: str, dtype: str, tiny: TinyFactory) -> None:
    bundle = Bundle.open(block_bundle(tiny, family, block_dtype=dtype))
    check_twenty_steps(bundle, OnnxEngine(bundle, 1), family)


def executorch_bundle(tiny: TinyFactory, family: str, **settings: Any) -> Bundle:
    bundle = block_bundle(tiny, family, **settings)
    programs = bundle.with_name(f"{bundle.name}-with-programs")
    if not programs.exists():
        with pytest.MonkeyPatch.context() as changed:
            for name in ("positions", "labelled"):
                changed.setitem(to_executorch.BOUNDS, name, FEW_TOKENS)
            with_programs(bundle, family, settings.get("block_dtype", "fp32"))
    return Bundle.open(programs)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, marks=[*NEEDED, pytest.mark.slow])  # each exports eight programs
        for family, dtype in one_in(5, (("llama", "fp32"), ("llama", "fp16"), ("llama", "int8"), ("gpt2", "fp16"),
                                        ("gemma2", "fp32"), ("mpt", "int8"), ("bloom", "fp32"), ("llama", "int4"),
                                        ("apertus", "fp32")))
    ],
)  # fmt: skip
def test_twenty_steps_on_executorch_match_torch(family: str, dtype: str, tiny: TinyFactory) -> None:
    bundle = executorch_bundle(tiny, family, block_dtype=dtype)
    engine = ExecutorchEngine(bundle, 1)
    check_twenty_steps(bundle, engine, family)
    check_bound(bundle, engine)
    if family not in WITHOUT_DECODE:
        check_token_by_token(bundle, engine)
        check_answers(bundle, engine)


def check_answers(bundle: Bundle, engine: ExecutorchEngine) -> None:
    """What ONNX Runtime gives where adapters act on answers only, first rows a few at a time."""
    batch = pack(list(random_answers(3).acting_on_answers(INVOCATION))).until_last_label()
    spec = bundle.manifest.device_blocks
    assert spec is not None
    x, found = random_states(bundle, len(batch.ids)), []
    for each, most_new in ((engine, 4), (OnnxEngine(bundle, 1), None)):
        blocks = AnswerBlocks(bundle, each, len(spec.blocks), RANK, most_new)
        lora = random_lora(blocks.parameter_shapes)
        last, kept = blocks.forward(x, batch, lora, SCALING)
        found.append({"": last, **blocks.backward(np.ones_like(last), kept, lora, SCALING)})
    assert set(found[0]) == set(found[1])
    for name, value in found[0].items():
        assert oracles.relative_error(value, found[1][name]) <= PATH, name


def check_token_by_token(bundle: Bundle, engine: ExecutorchEngine) -> None:
    """What ONNX Runtime gives for tokens in two pieces, and then one by one."""
    x = random_states(bundle, 9)
    found = []
    for each in (engine, OnnxEngine(bundle, 1)):
        blocks = DecodeBlocks(bundle, each, 2, DeviceLora())
        pieces = (slice(0, 4), slice(4, 7), slice(7, 8), slice(8, 9))
        found.append(np.concatenate([blocks.append(x[piece]) for piece in pieces]))
    assert np.abs(found[0] - found[1]).max() <= 1e-5 * np.abs(found[1]).max()


def check_bound(bundle: Bundle, engine: ExecutorchEngine) -> None:
    """Tokens that see each other are not cut: more than the programs take is one line, and as many as they take not."""
    blocks = DeviceBlocks(bundle, engine, 1, RANK)
    width = bundle.manifest.base_model.hidden_size
    for labelled in (np.arange(1), np.arange(FEW_TOKENS)):  # one to all of them
        x, lengths = np.ones((FEW_TOKENS, width), np.float32), np.array([FEW_TOKENS - 3, 3])
        blocks.forward(x, lengths, labelled, {}, SCALING)
    x, lengths = np.ones((FEW_TOKENS + 1, width), np.float32), np.array([FEW_TOKENS - 2, 3])
    with pytest.raises(UsageError) as caught:
        blocks.forward(x, lengths, np.arange(3), {}, SCALING)
    said = str(caught.value)
    assert f"a micro-batch of {FEW_TOKENS + 1} tokens is more than" in said
    assert f"({FEW_TOKENS}); lower --batch-size or --max-length, or use --engine onnx" in said
    assert "\n" not in said


# -- what is left out, and what cannot be -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tiny: TinyFactory) -> Bundle:
    return Bundle.open(block_bundle(tiny))


def random_states(bundle: Bundle, tokens: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, bundle.manifest.base_model.hidden_size), np.float32)


def test_module_without_lora_gives_the_bits_of_zeros(llama: Bundle) -> None:
    blocks = DeviceBlocks(llama, OnnxEngine(llama, 1), 2, RANK)
    some = {name: value for name, value in random_lora(blocks.parameter_shapes).items() if "q_proj" in name}
    zeros = {name: np.zeros(shape, np.float32) for name, shape in blocks.parameter_shapes.items()}
    x, grad = random_states(llama, 13), random_states(llama, len(LABELLED), 6)
    (one, kept_one), (other, kept_other) = (
        blocks.forward(x, LENGTHS, LABELLED, lora, SCALING) for lora in (some, zeros | some)
    )
    assert one.tobytes() == other.tobytes()
    found = blocks.backward(grad, kept_one, some, SCALING)
    wanted = blocks.backward(grad, kept_other, zeros | some, SCALING)
    assert set(found) == set(some)
    assert set(wanted) == set(zeros)
    assert all(value.tobytes() == wanted[name].tobytes() for name, value in found.items())


def test_one_block_of_two_is_the_second_half(llama: Bundle) -> None:
    engine = OnnxEngine(llama, 1)
    both, last = (DeviceBlocks(llama, engine, count, RANK) for count in (2, 1))
    assert (both.first, last.first) == (0, 1)
    assert set(last.parameter_shapes) == {name for name in both.parameter_shapes if name.startswith("model.layers.1.")}
    lora = random_lora(both.parameter_shapes)
    x, grad = random_states(llama, 13), random_states(llama, len(LABELLED), 6)
    wanted, kept = both.forward(x, LENGTHS, LABELLED, lora, SCALING)
    middle = kept.inputs[1]["x"]
    found, kept_of_last = last.forward(middle, LENGTHS, LABELLED, lora, SCALING)
    assert found.tobytes() == wanted.tobytes()
    grads = last.backward(grad, kept_of_last, lora, SCALING)
    assert set(grads) == set(last.parameter_shapes)
    of_both = both.backward(grad, kept, lora, SCALING)
    assert all(value.tobytes() == of_both[name].tobytes() for name, value in grads.items())


def test_packed_sequences_do_not_see_each_other(llama: Bundle) -> None:
    """What one of them is changes no number of another beyond rounding: sums may be taken in another order."""
    blocks = DeviceBlocks(llama, OnnxEngine(llama, 1), 2, RANK)
    lora, x = random_lora(blocks.parameter_shapes), random_states(llama, 13)
    other = np.concatenate([random_states(llama, 8, 9) * 3, x[8:]])
    labelled = np.arange(8, 13)
    found, wanted = (blocks.forward(each, LENGTHS, labelled, lora, SCALING)[0] for each in (other, x))
    assert oracles.relative_error(found, wanted) <= oracles.SUMS


def test_sequence_longer_than_the_tables_is_one_line(llama: Bundle) -> None:
    blocks = DeviceBlocks(llama, OnnxEngine(llama, 1), 2, RANK)
    blocks.forward(random_states(llama, 64), np.array([64]), LABELLED, {}, SCALING)
    with pytest.raises(DataError, match=r"a sequence of 65 tokens, blocks on a device take 64; set --max-length 64$"):
        blocks.forward(random_states(llama, 66), np.array([1, 65]), LABELLED, {}, SCALING)


def test_every_pass_of_a_block_may_use_all_threads(llama: Bundle) -> None:
    kinds = {graph.kind: _is_large(graph) for graph in llama.manifest.graphs if graph.kind.startswith(OF_BLOCKS)}
    assert len(kinds) == 9
    assert all(kinds.values()), kinds


@pytest.mark.parametrize("count", [0, -1, 3])
def test_more_blocks_than_there_are_is_one_line(llama: Bundle, count: int) -> None:
    with pytest.raises(BundleError, match=rf"has 2 blocks for a device, not {count}; export it again with"):
        DeviceBlocks(llama, OnnxEngine(llama, 1), count, RANK)
