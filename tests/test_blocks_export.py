"""Exporting blocks for a device: what is refused, what ``selftest`` notices, and weights that are widened in parts."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import oracles
import pytest
import torch
from block_bundles import block_bundle, stored_as
from block_oracle import TorchBlocks, random_lora
from drawn import one_in
from families import save_tiny, tiny_model
from processes import run_edge, run_export
from safetensors.numpy import load_file
from test_blocks import EXACT_AND_SINGLE, RANK, SCALING, check_each_graph
from tiny import TinyFactory
from torch import nn

from dlora.cloud.model.base_model import BaseModel, load_base_model
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_check import check_graph
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.blocks import DeviceBlocks
from dlora.export.bundle import export_bundle
from dlora.export.device_blocks import gives_the_same
from dlora.export.graphs.block import block_graphs
from dlora.export.graphs.graph import TrainingGraph
from dlora.export.settings import ExportSettings
from dlora.export.tracing import onnx_products
from dlora.export.tracing.calls import BlockCall, record_calls
from dlora.export.tracing.modules import stored_weights
from dlora.export.tracing.simplify import simplify
from dlora.export.tracing.trace import trace_block
from dlora.export.verify import compile_onnx
from dlora.protocol.errors import ExportError
from dlora.protocol.manifest import MANIFEST_NAME, BlockSpec, FileSpec, Manifest, encode_manifest, load_manifest

# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_says_a_line_a_block(tiny: TinyFactory, tmp_path: Path) -> None:
    done = run_export(tiny().model, "--out", tmp_path / "bundle", "--device-blocks", "all")
    assert done.code == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("block ")]
    assert lines == ["block 1 of 2 is ready", "block 2 of 2 is ready"]


@pytest.mark.parametrize(
    ("family", "count", "code", "text"),
    [
        ("llama", 3, 2, r"error: --device-blocks 3 is more than the 2 blocks of "),
        ("llama", -1, 2, r"error: --device-blocks must be at least 0"),
        ("mixtral", 1, 11, r"\(mixtral\) has no blocks for a device: .* mixture of .*; leave out --device-b"),
        ("openai-gpt", 2, 11, r"\(openai-gpt\) has no blocks for a device: .* no attention mask.*; leave out"),
    ],
)
def test_blocks_that_cannot_be_are_one_line_and_leave_nothing(
    tmp_path: Path, family: str, count: int, code: int, text: str
) -> None:
    save_tiny(tmp_path / "model", family)
    done = run_export(tmp_path / "model", "--out", tmp_path / "bundle", "--device-blocks", count)
    assert done.code == code, done.stderr
    (line,) = done.errors
    assert re.search(text, line)
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_values_that_fp16_cannot_hold_name_the_option(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "model")
    settings = ExportSettings(str(tmp_path / "model"), tmp_path / "bundle", head_dtype="fp32", device_blocks=1)
    with pytest.raises(ExportError, match=r"^[^\n]*--block-dtype fp32[^\n]*$"):
        export_bundle(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# -- selftest ----------------------------------------------------------------------------------------------------


def list_of_blocks(bundle: Bundle) -> tuple[BlockSpec, ...]:
    assert bundle.manifest.device_blocks is not None
    return bundle.manifest.device_blocks.blocks


OF_BLOCKS = {
    "block_forward", "block_backward", "last_block_forward", "last_block_backward", "block_decode",
    "answer_block_forward", "answer_block_backward", "first_rows", "last_first_rows",
}  # fmt: skip


@pytest.mark.parametrize("dtype", one_in(2, ("int8", "int4")))
def test_selftest_passes_and_notices_a_weight_of_another_block(dtype: str, tiny: TinyFactory, tmp_path: Path) -> None:
    bundle = block_bundle(tiny, block_dtype=dtype)
    done = run_edge("selftest", "--bundle", bundle, "--json")
    report = json.loads(done.stdout)
    assert done.code == 0, done.stderr
    kinds = {row["graph"] for row in report["graphs"]}
    assert kinds >= {*OF_BLOCKS, "final_norm_forward", "final_norm_backward"}
    copy, manifest = tmp_path / "bundle", load_manifest(bundle)
    shutil.copytree(bundle, copy)
    first, last = (block.weights["mlp.up_proj.weight"] for block in list_of_blocks(Bundle.open(bundle)))
    content = (copy / first).read_bytes()
    (copy / last).write_bytes(content)
    spec = FileSpec(len(content), hashlib.sha256(content).hexdigest())
    changed: Manifest = msgspec.structs.replace(manifest, files={**manifest.files, last: spec})
    (copy / MANIFEST_NAME).write_bytes(encode_manifest(changed))
    done = run_edge("selftest", "--bundle", copy, "--json")
    assert done.code == 1, done.stderr
    wrong = {row["graph"] for row in json.loads(done.stdout)["graphs"] if not row["passed"]}
    assert wrong == OF_BLOCKS - {"last_first_rows"}  # which takes no such weight


def test_golden_vectors_hold_no_weight(tiny: TinyFactory) -> None:
    bundle = block_bundle(tiny)
    manifest = load_manifest(bundle)
    golden = load_file(bundle / manifest.golden)
    (block, *_) = list_of_blocks(Bundle.open(bundle))
    names = {name.partition(".in.")[2] for name in golden if name.startswith("block_")}
    assert not names & set(block.weights)
    assert names >= {"x", "mask", "scale", *block.tables}


# -- blocks that share a graph -----------------------------------------------------------------------------------


@pytest.mark.parametrize("by_place", [False, True], ids=["one scale", "a scale for each block"])
def test_a_graph_is_shared_where_another_block_computes_the_same(by_place: bool) -> None:
    """Weights are inputs; the scale of attention's scores stands in the graph."""
    base = BaseModel.from_model(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=by_place), "gpt2")
    first, second = record_calls(base)
    targets = ("attn.c_attn",)
    of_first, of_second = (stored_weights(call.block, "fp32") for call in (first, second))
    traced = simplify(trace_block(first, of_first, targets))
    assert gives_the_same(traced, first, of_first, targets)
    assert gives_the_same(traced, second, of_second, targets) is not by_place
    assert not gives_the_same(traced, second, stored_weights(second.block, "fp16"), targets)
    assert not gives_the_same(traced, second, of_second, ("attn.c_attn", "attn.c_proj"))


# -- weights that are widened in parts ---------------------------------------------------------------------------


class Chain(nn.Module):
    """As small a block as there is with large weights: two linear modules, up and down."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.down(torch.tanh(self.up(hidden_states)))


def chain_call(chain: Chain) -> BlockCall:
    x = torch.randn(1, 23, chain.up.in_features, generator=torch.Generator().manual_seed(1))
    leaves, structure = torch.utils._pytree.tree_flatten(({"hidden_states": x},))
    config = BaseModel.from_model(tiny_model("llama"), "llama").model.config
    return BlockCall(0, "chain", chain, tuple(leaves), structure, {}, 23, config)


def chain_graphs(chain: Chain, dtype: Any) -> tuple[dict[str, torch.Tensor], tuple[TrainingGraph, TrainingGraph]]:
    weights, targets = stored_weights(chain, dtype), ("up", "down")
    return weights, block_graphs(simplify(trace_block(chain_call(chain), weights, targets)), weights, targets, "0")


def test_a_graph_is_not_shared_with_a_block_of_other_widths() -> None:
    narrow, other, wide = (Chain(8, inner) for inner in (16, 16, 24))
    weights = {chain: stored_weights(chain, "fp32") for chain in (narrow, other, wide)}
    targets = ("up", "down")
    traced = simplify(trace_block(chain_call(narrow), weights[narrow], targets))
    assert gives_the_same(traced, chain_call(other), weights[other], targets)
    assert not gives_the_same(traced, chain_call(wide), weights[wide], targets)


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_large_weight_is_widened_in_parts_without_an_error(dtype: str) -> None:
    """Forward and backward of 2048 x 1024 and 1024 x 2048 are those of the whole, stored weights."""
    torch.manual_seed(0)
    width, inner, tokens, rank = 1024, 2048, 6, 3
    assert width * inner > onnx_products.SLAB_VALUES
    chain = Chain(width, inner)
    weights, graphs = chain_graphs(chain, dtype)
    for graph in graphs:
        model = graph.to_onnx()
        check_graph(model.SerializeToString())
        assert sum(node.op_type == "Scan" for node in model.graph.node) == 2
        assert largest_float(model) < width * inner
    names = {"up.lora_A": (rank, width), "up.lora_B": (inner, rank), "down.lora_A": (rank, inner),
             "down.lora_B": (width, rank)}  # fmt: skip
    lora = random_lora(names)
    random = np.random.default_rng(2)
    given = {name: random.standard_normal((tokens, width), np.float32) for name in ("x", "grad")}
    given |= {"scale": np.array(2.0, np.float32), **lora} | {name: value.numpy() for name, value in weights.items()}
    exact, single = (chain_in_torch(given, torch_dtype) for torch_dtype in (torch.float64, torch.float32))
    for graph in graphs:
        found = compile_onnx(graph).run({spec.name: given[spec.name] for spec in graph.inputs})
        given |= {spec.name: value for spec, value in zip(graph.outputs, found, strict=True)}
        for spec in graph.outputs:
            if spec.name in exact:
                bound = max(oracles.SUMS, 4 * oracles.relative_error(single[spec.name], exact[spec.name]))
                assert oracles.relative_error(given[spec.name], exact[spec.name]) <= bound, spec.name


def chain_in_torch(given: dict[str, Any], dtype: torch.dtype) -> oracles.Arrays:
    x = torch.from_numpy(given["x"]).to(dtype).requires_grad_()
    lora = {name: torch.from_numpy(given[name]).to(dtype).requires_grad_() for name in given if ".lora_" in name}

    def product(rows: torch.Tensor, name: str) -> torch.Tensor:
        frozen = rows @ stored_as(given, name).to(dtype).T
        return frozen + 2.0 * (rows @ lora[f"{name}.lora_A"].T) @ lora[f"{name}.lora_B"].T

    y = x + product(torch.tanh(product(x, "up")), "down") + torch.from_numpy(given["down.bias"]).to(dtype)
    grads = torch.autograd.grad(y, [x, *lora.values()], torch.from_numpy(given["grad"]).to(dtype))
    names = ["y", "grad_x", *(f"grad.{name}" for name in lora)]
    return {name: tensor.detach().numpy() for name, tensor in zip(names, (y, *grads), strict=True)}


def largest_float(model: onnx.ModelProto) -> int:
    """Of the values of a graph whose size is known: how many float32 there are in one."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    sizes = [
        [dimension.dim_value for dimension in value.type.tensor_type.shape.dim if dimension.dim_value]
        for value in inferred.value_info
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    ]
    return max((int(np.prod(size)) for size in sizes), default=0)


def test_weight_of_odd_rows_is_widened_as_far_as_it_comes_out_even() -> None:
    sizes = ((2048, 1024), (2049, 1024), (1024, 1024), (6 * 4096, 4096))
    assert [onnx_products._slabs(*size) for size in sizes] == [2, 1, 1, 128]


# -- a real model ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["fp32", *one_in(3, ["fp16", "int8", "int4"])])
def test_last_blocks_of_smollm2_match_peft_and_autograd(dtype: Any, smollm2: Path, tmp_path: Path) -> None:
    """Of the last two, each given the same input and a gradient of its own; torch has the weights that are stored."""
    export_bundle(ExportSettings("smollm2-135m", tmp_path / "bundle", device_blocks=2, block_dtype=dtype))
    bundle = Bundle.open(tmp_path / "bundle")
    blocks = list_of_blocks(bundle)
    assert [(block.index, block.graph) for block in blocks] == [(28, "0"), (29, "0")]
    engine = OnnxEngine(bundle, 2)
    lora = random_lora(DeviceBlocks(bundle, engine, 2, RANK).parameter_shapes)
    assert len(lora) == 2 * 7 * 2
    models = {}
    for torch_dtype in EXACT_AND_SINGLE:
        model = load_base_model(str(smollm2)).model
        for block in blocks:
            stored = {name: np.array(bundle.weight(file)) for name, file in block.weights.items()}
            for full in {name.rpartition(".")[0] for name in lora if name.startswith(f"{block.path}.")}:
                weight = stored_as(stored, full.removeprefix(f"{block.path}."))
                model.get_submodule(full).weight.data.copy_(weight)
        models[torch_dtype] = TorchBlocks(model, [block.path for block in blocks], lora, SCALING, torch_dtype)
    check_each_graph(bundle, engine, models, lora)
