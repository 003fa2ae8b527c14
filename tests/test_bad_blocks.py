"""Bundles whose digests are right and whose blocks are not what they say: one line each."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import onnx
import pytest
from answers import INVOCATION, random_answers
from attacks.fuzz_target import decode_json, encode_json, mutate_value
from block_bundles import Files, changed
from drawn import DAY
from serving import random_dataset
from tiny import TinyFactory
from trunk_runs import trunk_config

from dlora.edge.data.batches import pack
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.answer_blocks import AnswerBlocks
from dlora.edge.model.block_weights import encoded_width
from dlora.edge.model.blocks import DeviceBlocks
from dlora.edge.model.decode_blocks import DecodeBlocks
from dlora.edge.model.device_lora import DeviceLora
from dlora.edge.model.embedding_source import EmbeddingSource
from dlora.edge.training.side import DeviceSide
from dlora.edge.training.trainer import Trainer
from dlora.protocol.errors import BundleError, DloraError, NonFiniteError
from dlora.protocol.manifest import MANIFEST_NAME, BlockSpec, GraphSpec, Manifest, TableSpec, TensorSpec, load_manifest

replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny(device_blocks=2, head_dtype="fp32").bundle


def blocks_with(change: Callable[[BlockSpec], BlockSpec]) -> Callable[[Manifest], Manifest]:
    def of_manifest(manifest: Manifest) -> Manifest:
        spec = manifest.device_blocks
        assert spec is not None
        return replace(manifest, device_blocks=replace(spec, blocks=tuple(map(change, spec.blocks))))

    return of_manifest


def graphs_with(kind: str, change: Callable[[GraphSpec], GraphSpec]) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(
        manifest, graphs=tuple(change(graph) if graph.kind == kind else graph for graph in manifest.graphs)
    )


def input_with(name: str, shape: tuple[int | str, ...]) -> Callable[[GraphSpec], GraphSpec]:
    """Another shape of the inputs whose names end so."""
    return lambda graph: replace(
        graph, inputs=tuple(replace(each, shape=shape) if each.name.endswith(name) else each for each in graph.inputs)
    )


def without_input(name: str) -> Callable[[GraphSpec], GraphSpec]:
    return lambda graph: replace(graph, inputs=tuple(each for each in graph.inputs if each.name != name))


def without_graphs(kind: str) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, graphs=tuple(graph for graph in manifest.graphs if graph.kind != kind))


def with_outputs(kind: str, count: int) -> Callable[[Manifest], Manifest]:
    return graphs_with(kind, lambda graph: replace(graph, outputs=graph.outputs[:count]))


def tables_with(axis: int) -> Callable[[BlockSpec], BlockSpec]:
    return lambda block: replace(
        block, tables={name: TableSpec(table.file, axis) for name, table in block.tables.items()}
    )


def keys_with(shape: tuple[int | str, ...]) -> Callable[[Manifest], Manifest]:
    return graphs_with("block_decode", input_with("past_keys", shape))


def without_final_norm(manifest: Manifest) -> Manifest:
    assert manifest.device_blocks is not None
    return replace(manifest, device_blocks=replace(manifest.device_blocks, final_norm={}))


CHANGES: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "an axis that there is not": (blocks_with(tables_with(7)), "too few positions"),
    "another axis": (blocks_with(tables_with(0)), "too few positions"),
    "no tables": (blocks_with(lambda block: replace(block, tables={})), "which its graph takes"),
    "no weights": (blocks_with(lambda block: replace(block, weights={})), "has no weight"),
    "one path twice": (blocks_with(lambda block: replace(block, path="model.layers.1")), "have the same path"),
    "others than the last": (blocks_with(lambda block: replace(block, index=block.index + 1)), "are not the last ones"),
    "a graph that there is not": (blocks_with(lambda block: replace(block, graph="9")), "no block_forward graph of 9"),
    "no final norm": (without_final_norm, "has no 0.weight, which its graph final_norm_forward takes"),
    "a negative width": (graphs_with("block_forward", input_with("A", (-3, 16))), "another shape than its weight"),
    "a huge width": (graphs_with("block_forward", input_with("A", ("rank", 10**13))), "another shape than its weight"),
    "fewer products": (with_outputs("block_forward", 1), "which its graph takes"),
    "fewer gradients": (with_outputs("block_backward", 3), "gives other gradients"),
    "no last block": (without_graphs("last_block_forward"), "no last_block_forward graph of 0"),
    "fewer gradients of the last block": (
        with_outputs("last_block_backward", 3), "last_block_backward.0 gives other gradients"
    ),
    "a last block that is not told which tokens": (
        graphs_with("last_block_forward", without_input("label_positions")), "fails on onnxruntime"
    ),
    "an input of no meaning": (
        graphs_with(
            "block_forward", lambda graph: replace(graph, inputs=(*graph.inputs, TensorSpec("odd", "fp32", (1,))))
        ),
        "has no odd, which its graph takes",
    ),
    "no hidden states": (graphs_with("block_forward", without_input("x")), "takes no hidden states"),
}  # fmt: skip


DECODE_CHANGES: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "no graph": (without_graphs("block_decode"), "no block_decode graph of 0"),
    "fewer outputs": (with_outputs("block_decode", 2), "something else"),
    "keys that are none": (keys_with(("past", 2, "past")), "are not .past, heads, width"),
    "huge keys": (keys_with(("past", 10**6, 10**6)), "are not .past, heads, width"),
    "other keys": (keys_with(("past", 1, 4)), "export"),
    "no reason": (
        lambda manifest: replace(
            manifest, device_blocks=replace(manifest.device_blocks, without_decode="of its odd attention")
        ),
        "cannot go on from earlier tokens on a device: of its odd attention; use --device-blocks 0",
    ),
}  # fmt: skip


def use(path: Path) -> int:
    """Forward and backward through both blocks; how many gradients there are."""
    opened = Bundle.open(path)
    width = encoded_width(opened.manifest)
    blocks = DeviceBlocks(opened, OnnxEngine(opened, 1), 2, 3)
    lora = {name: np.ones(shape, np.float32) for name, shape in blocks.parameter_shapes.items()}
    last, kept = blocks.forward(np.ones((6, width), np.float32), np.array([4, 2], np.int32), np.arange(6), lora, 1.0)
    return len(blocks.backward(last, kept, lora, 1.0))


def decode(path: Path) -> None:
    """Some tokens through both blocks, without a backward pass."""
    opened = Bundle.open(path)
    x = np.ones((3, encoded_width(opened.manifest)), np.float32)
    DecodeBlocks(opened, OnnxEngine(opened, 1), 2, DeviceLora()).append(x)


ANSWER_CHANGES: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "no graph": (without_graphs("answer_block_forward"), "no answer_block_forward graph of 0"),
    "no graph of first rows": (without_graphs("first_rows"), "no first_rows graph of 0"),
    "no keys alone": (without_graphs("last_first_rows"), "no last_first_rows graph of 0"),
    "fewer gradients": (with_outputs("answer_block_backward", 3), "answer_block_backward.0 gives other gradients"),
    "fewer outputs": (with_outputs("first_rows", 2), "first_rows of block 0 gives something else"),
    "huge keys": (
        graphs_with("first_rows", input_with("past_keys", ("past", 10**6, 10**6))), "are not .past, heads, width"
    ),
    "other keys": (graphs_with("first_rows", input_with("past_keys", ("past", 1, 4))), "export"),
    "other keys of the last block": (with_outputs("last_first_rows", 1), "gives something else"),
    "no reason": DECODE_CHANGES["no reason"],
}  # fmt: skip


def answer(path: Path) -> None:
    """Forward and backward through both blocks at the rows of answers."""
    opened = Bundle.open(path)
    blocks = AnswerBlocks(opened, OnnxEngine(opened, 1), 2, 3)
    lora = {name: np.ones(shape, np.float32) for name, shape in blocks.parameter_shapes.items()}
    batch = pack(list(random_answers().acting_on_answers(INVOCATION))).until_last_label()
    last, kept = blocks.forward(np.ones((len(batch.ids), encoded_width(opened.manifest)), np.float32), batch, lora, 1.0)
    blocks.backward(last, kept, lora, 1.0)


@pytest.mark.parametrize(
    ("run", "change", "text"),
    [
        (run, *each)
        for run, changes in ((use, CHANGES), (decode, DECODE_CHANGES), (answer, ANSWER_CHANGES))
        for each in changes.values()
    ],
    ids=[
        *CHANGES, *(f"decode: {name}" for name in DECODE_CHANGES), *(f"answers: {name}" for name in ANSWER_CHANGES)
    ],
)  # fmt: skip
def test_blocks_that_lie_are_one_line(
    bundle: Path, run: Callable[[Path], object], change: Callable[[Manifest], Manifest], text: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=text) as raised:
        run(changed(bundle, tmp_path / "bundle", change))
    assert "\n" not in str(raised.value)


def test_files_that_lie_are_one_line(bundle: Path, tmp_path: Path) -> None:
    assert use(changed(bundle, tmp_path / "same")) == 28
    spec = load_manifest(bundle).device_blocks
    assert spec is not None
    weight = spec.blocks[1].weights["mlp.up_proj.weight"]
    table = next(iter(spec.blocks[0].tables.values())).file
    wrong: list[tuple[Files, str]] = [
        ({weight: np.zeros((16, 24), np.float32)}, "another shape than its weight"),
        ({weight: np.zeros((24, 16), np.int8)}, "another shape or dtype than its graph says"),
        ({weight: np.zeros(24 * 16, np.float32)}, "has no weight"),
        ({table: np.zeros((1, 3, 4), np.float32)}, "too few positions"),
    ]
    for index, (files, text) in enumerate(wrong):
        with pytest.raises(BundleError, match=text):
            use(changed(bundle, tmp_path / str(index), files=files))


def train(path: Path) -> None:
    """A step with all blocks on the device, an evaluation, tokens one after the other, and a step on answers."""
    opened = Bundle.open(path)
    engine, vocabulary = OnnxEngine(opened, 1), opened.manifest.base_model.vocabulary_size
    source, data = EmbeddingSource(opened, engine), random_dataset(min(vocabulary, 97), 4)
    trainer = Trainer(opened, engine, partial(DeviceSide, source=source), trunk_config((0, 1), is_local=True), data)
    trainer.run_step()
    trainer.evaluate(data)
    blocks = DecodeBlocks(opened, engine, 2, DeviceLora())
    for ids in ([3, 4], [3, 4, 5]):
        source.feed(np.array(ids), len(ids), blocks, 0)
    run = trunk_config((0, 1), is_local=True, invocation=INVOCATION)
    Trainer(opened, engine, partial(DeviceSide, source=source), run, random_answers()).run_step()


def with_output(content: bytes, name: str, operator: str) -> bytes:
    """A graph that gives one output twice over, or in float64, and does not say of which shape it is."""
    model = onnx.load_from_string(content)
    output = next(each for each in model.graph.output if each.name == name)
    for node in model.graph.node:
        for names in (node.output, node.input):
            for index, found in enumerate(names):
                names[index] = f"{name}_" if found == name else found
    inputs, settings = ([f"{name}_"] * 2, {"axis": 0}) if operator == "Concat" else ([f"{name}_"], {"to": 11})
    model.graph.node.append(onnx.helper.make_node(operator, inputs, [name], **settings))
    output.type.tensor_type.ClearField("shape")
    if operator == "Cast":
        output.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    return model.SerializeToString()


@pytest.mark.parametrize("operator", ["Concat", "Cast"])
@pytest.mark.parametrize(
    ("graph", "output"),
    [
        ("block_backward.0", "grad.mlp.up_proj.lora_B"), ("last_block_forward.0", "y"), ("block_decode.0", "y"),
        ("first_rows.0", "keys"), ("answer_block_backward.0", "grad.mlp.up_proj.lora_B"),
        ("final_norm_backward", "grad_x"), ("head_train", "losses"), ("head_loss", "losses"),
        ("adamw", "new_exp_avg_sq"), ("embedding", "hidden_states"),
    ],
)  # fmt: skip
def test_graph_that_gives_something_else_is_one_line(
    bundle: Path, graph: str, output: str, operator: str, tmp_path: Path
) -> None:
    """numpy stretches what is too short, and fails at what is too long in any way."""
    name = f"graphs/{graph}.onnx"
    content = with_output((bundle / name).read_bytes(), output, operator)
    with pytest.raises(BundleError, match="another shape or dtype than its graph says; export the bundle again"):
        train(changed(bundle, tmp_path / "bundle", files={name: content}))


@pytest.mark.parametrize(
    ("name", "output"),
    [("answer_block_forward.0", "y"), ("first_rows.0", "y"), ("final_norm_backward", "grad_x")],
)
def test_more_rows_than_there_are_is_one_line(bundle: Path, name: str, output: str, tmp_path: Path) -> None:
    """Of a graph whose manifest says so as well."""
    kind = name.partition(".")[0]
    change = graphs_with(
        kind,
        lambda graph: replace(
            graph,
            outputs=tuple(
                replace(each, shape=("twice", each.shape[1])) if each.name == output else each for each in graph.outputs
            ),
        ),
    )
    file = f"graphs/{name}.onnx"
    content = with_output((bundle / file).read_bytes(), output, "Concat")
    with pytest.raises(BundleError, match="another shape than its rows"):
        answer(changed(bundle, tmp_path / "bundle", change, {file: content}))


def with_part(content: bytes, change: Callable[[onnx.GraphProto], object]) -> bytes:
    model = onnx.load_from_string(content)
    change(model.graph)
    return model.SerializeToString()


def huge_initializer(graph: onnx.GraphProto) -> None:
    graph.initializer.append(onnx.TensorProto(name="w", data_type=1, dims=[10**12]))


def external_data(graph: onnx.GraphProto) -> None:
    huge_initializer(graph)
    graph.initializer[0].external_data.add(key="location", value="/etc/passwd")


def branch(graph: onnx.GraphProto) -> None:
    inner = onnx.helper.make_graph([], "inner", [], [])
    graph.node.append(onnx.helper.make_node("If", ["scale"], ["odd"], then_branch=inner, else_branch=inner))


PARTS: dict[str, tuple[Callable[[onnx.GraphProto], object], str]] = {
    "a file of the device": (external_data, "takes data from another file"),
    "a huge weight": (huge_initializer, "field 5 in a graph"),
    "a branch": (branch, "the operator 'If'"),
    "an operator of somebody else": (lambda graph: setattr(graph.node[0], "domain", "com.microsoft"), "the operator"),
    "an input more": (
        lambda graph: graph.input.add().CopyFrom(onnx.helper.make_tensor_value_info("odd", 1, [])), "fails on"
    ),
    "an input less": (lambda graph: graph.input.pop(), "does not load"),
    "an input of another shape": (
        lambda graph: graph.input[0].type.tensor_type.shape.dim.add(dim_value=5), "does not load|fails on"
    ),
    "an output less": (lambda graph: graph.output.pop(), "fails on|does not load"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_block_graph_with_a_forbidden_part_is_one_line(bundle: Path, name: str, tmp_path: Path) -> None:
    change, text = PARTS[name]
    graph = "graphs/block_forward.0.onnx"
    wrong = changed(bundle, tmp_path / "bundle", files={graph: with_part((bundle / graph).read_bytes(), change)})
    with pytest.raises(BundleError, match=text) as raised:
        use(wrong)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def int4(tiny: TinyFactory) -> Path:
    return tiny(device_blocks=2, block_dtype="int4", head_dtype="fp32").bundle


def test_scales_and_packed_weights_that_lie_are_one_line(int4: Path, tmp_path: Path) -> None:
    train(int4)
    spec = load_manifest(int4).device_blocks
    assert spec is not None
    weights = spec.blocks[0].weights
    grouped = [weights[f"self_attn.q_proj.weight{each}"] for each in ("", ".group_scales")]
    packed, scales = (np.load(int4 / name) for name in grouped)
    wrong: list[tuple[Files, str]] = [
        ({grouped[1]: scales[:-1]}, "weight.group_scales has another shape"),
        ({grouped[1]: np.concatenate([scales, scales], 1)}, "weight.group_scales has another shape"),
        ({grouped[1]: scales.astype(np.float32)}, "weight.group_scales has another shape or dtype"),
        ({grouped[0]: packed[..., :-1]}, "another shape than its weight"),
        ({grouped[0]: packed.reshape(len(packed), 1, -1)[..., : packed.shape[2]]}, "another shape"),
        ({grouped[0]: packed.reshape(-1)}, "has no weight"),
        ({grouped[0]: packed.astype(np.float16)}, "another shape or dtype"),
    ]
    if packed.shape[1] == 1:  # of one group only, the fifth is no change
        wrong.pop(4)
    for index, (files, text) in enumerate(wrong):
        with pytest.raises(BundleError, match=text):
            train(changed(int4, tmp_path / str(index), files=files))
    for index, value in enumerate((np.nan, np.inf)):
        scales[...] = value
        with pytest.raises(NonFiniteError, match=r"nothing was learnt yet.*selftest") as raised:
            train(changed(int4, tmp_path / f"{index} of no number", files={grouped[1]: scales}))
        assert "--lr" not in str(raised.value)
    for index, value in enumerate((0, np.finfo(np.float16).max)):
        scales[...] = value
        train(changed(int4, tmp_path / f"{index} of a number", files={grouped[1]: scales}))


def mutated(bundle: Path, copy: Path, rng: Random) -> Path:
    """A copy with a few fields of its blocks, graphs or ends changed."""
    shutil.copytree(bundle, copy)
    value = decode_json((bundle / MANIFEST_NAME).read_bytes())
    part = rng.choice(("device_blocks", "graphs", "graphs", "embedding", "head", "base_model"))
    if part == "graphs":
        index = rng.randrange(len(value[part]))
        value[part][index] = mutate_value(value[part][index], rng)
    else:
        value[part] = mutate_value(value[part], rng)
    (copy / MANIFEST_NAME).write_bytes(encode_json(value))
    return copy


@pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(100 * DAY, 100 * DAY + 100), marks=pytest.mark.slow)], ids=["40", "100"]
)
def test_mutated_blocks_train_or_are_refused(int4: Path, seeds: range, tmp_path: Path) -> None:
    for seed in seeds:
        copy = mutated(int4, tmp_path / "bundle", Random(seed))
        with suppress(DloraError):
            train(copy)
        shutil.rmtree(copy)
