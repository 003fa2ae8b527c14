"""Bundles whose digests are right and whose blocks are not what they say: one line each."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tiny import TinyFactory

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.blocks import DeviceBlocks
from dlora.edge.model.decode_blocks import DecodeBlocks
from dlora.edge.model.device_lora import DeviceLora
from dlora.edge.model.trunk_source import encoded_width
from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import (
    MANIFEST_NAME,
    BlockSpec,
    FileSpec,
    GraphSpec,
    Manifest,
    TableSpec,
    TensorSpec,
    encode_manifest,
    load_manifest,
)

Files = Mapping[str, np.ndarray[Any, Any]]
replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny(device_blocks=2).bundle


def blocks_with(change: Callable[[BlockSpec], BlockSpec]) -> Callable[[Manifest], Manifest]:
    def changed(manifest: Manifest) -> Manifest:
        spec = manifest.device_blocks
        assert spec is not None
        return replace(manifest, device_blocks=replace(spec, blocks=tuple(map(change, spec.blocks))))

    return changed


def graphs_with(kind: str, change: Callable[[GraphSpec], GraphSpec]) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(
        manifest, graphs=tuple(change(graph) if graph.kind == kind else graph for graph in manifest.graphs)
    )


def lora_a_with(shape: tuple[int | str, ...]) -> Callable[[GraphSpec], GraphSpec]:
    return lambda graph: replace(
        graph, inputs=tuple(replace(each, shape=shape) if each.name.endswith("A") else each for each in graph.inputs)
    )


def keys_with(shape: tuple[int | str, ...]) -> Callable[[GraphSpec], GraphSpec]:
    return lambda graph: replace(
        graph, inputs=tuple(replace(each, shape=shape) if each.name == "past_keys" else each for each in graph.inputs)
    )


def tables_with(axis: int) -> Callable[[BlockSpec], BlockSpec]:
    return lambda block: replace(
        block, tables={name: TableSpec(table.file, axis) for name, table in block.tables.items()}
    )


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
    "no final norm": (without_final_norm, "Required inputs"),
    "a negative width": (graphs_with("block_forward", lora_a_with((-3, 16))), "another shape than its weight"),
    "a huge width": (graphs_with("block_forward", lora_a_with(("rank", 10**13))), "another shape than its weight"),
    "fewer products": (
        graphs_with("block_forward", lambda graph: replace(graph, outputs=graph.outputs[:1])),
        "which its graph takes",
    ),
    "fewer gradients": (
        graphs_with("block_backward", lambda graph: replace(graph, outputs=graph.outputs[:3])),
        "gives other gradients",
    ),
    "no last block": (
        lambda manifest: replace(
            manifest, graphs=tuple(graph for graph in manifest.graphs if graph.kind != "last_block_forward")
        ),
        "no last_block_forward graph of 0",
    ),
    "fewer gradients of the last block": (
        graphs_with("last_block_backward", lambda graph: replace(graph, outputs=graph.outputs[:3])),
        "last_block_backward.0 gives other gradients",
    ),
    "a last block that is not told which tokens": (
        graphs_with(
            "last_block_forward",
            lambda graph: replace(
                graph, inputs=tuple(tensor for tensor in graph.inputs if tensor.name != "label_positions")
            ),
        ),
        "fails on onnxruntime",
    ),
    "an input of no meaning": (
        graphs_with(
            "block_forward", lambda graph: replace(graph, inputs=(*graph.inputs, TensorSpec("odd", "fp32", (1,))))
        ),
        "has no odd, which its graph takes",
    ),
    "no hidden states": (
        graphs_with("block_forward", lambda graph: replace(graph, inputs=graph.inputs[1:])), "takes no hidden states"
    ),
}  # fmt: skip


DECODE_CHANGES: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "no graph": (
        lambda manifest: replace(
            manifest, graphs=tuple(graph for graph in manifest.graphs if graph.kind != "block_decode")
        ),
        "no block_decode graph of 0",
    ),
    "fewer outputs": (
        graphs_with("block_decode", lambda graph: replace(graph, outputs=graph.outputs[:2])), "something else"
    ),
    "keys that are none": (graphs_with("block_decode", keys_with(("past", 2, "past"))), "are not .past, heads, width"),
    "huge keys": (graphs_with("block_decode", keys_with(("past", 10**6, 10**6))), "are not .past, heads, width"),
    "other keys": (graphs_with("block_decode", keys_with(("past", 1, 4))), "export"),
    "no reason": (
        lambda manifest: replace(
            manifest, device_blocks=replace(manifest.device_blocks, without_decode="of its odd attention")
        ),
        "cannot go on from earlier tokens on a device: of its odd attention; use --mode split",
    ),
}  # fmt: skip


def changed(
    bundle: Path, copy: Path, change: Callable[[Manifest], Manifest] = lambda manifest: manifest, files: Files = {}  # noqa: B006
) -> Path:
    """A copy with another manifest and other weights, whose digests are right."""
    shutil.copytree(bundle, copy)
    manifest = change(load_manifest(copy))
    specs = dict(manifest.files)
    for name, values in files.items():
        np.save(copy / name, values)
        content = (copy / name).read_bytes()
        specs[name] = FileSpec(len(content), hashlib.sha256(content).hexdigest())
    (copy / MANIFEST_NAME).write_bytes(encode_manifest(replace(manifest, files=specs)))
    return copy


def use(path: Path) -> int:
    """Forward and backward through both blocks; how many gradients there are."""
    opened = Bundle.open(path)
    width = encoded_width(opened.manifest)
    blocks = DeviceBlocks(opened, OnnxEngine(opened, 1), 2, 3)
    lora = {name: np.ones(shape, np.float32) for name, shape in blocks.parameter_shapes.items()}
    last, kept = blocks.forward(np.ones((6, width), np.float32), np.array([4, 2], np.int32), np.arange(6), lora, 1.0)
    return len(blocks.backward(last, kept, lora, 1.0))


@pytest.mark.parametrize("name", DECODE_CHANGES)
def test_blocks_that_lie_of_earlier_tokens_are_one_line(bundle: Path, name: str, tmp_path: Path) -> None:
    change, text = DECODE_CHANGES[name]
    opened = Bundle.open(changed(bundle, tmp_path / "bundle", change))
    x = np.ones((3, encoded_width(opened.manifest)), np.float32)
    with pytest.raises(BundleError, match=text) as raised:
        DecodeBlocks(opened, OnnxEngine(opened, 1), 2, DeviceLora()).append(x)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", CHANGES)
def test_blocks_that_lie_are_one_line(bundle: Path, name: str, tmp_path: Path) -> None:
    change, text = CHANGES[name]
    with pytest.raises(BundleError, match=text) as raised:
        use(changed(bundle, tmp_path / "bundle", change))
    assert "\n" not in str(raised.value)


def test_files_that_lie_are_one_line(bundle: Path, tmp_path: Path) -> None:
    assert use(changed(bundle, tmp_path / "same")) == 28
    spec = load_manifest(bundle).device_blocks
    assert spec is not None
    weight = spec.blocks[1].weights["mlp.up_proj.weight"]
    table = next(iter(spec.blocks[0].tables.values())).file
    wrong: list[tuple[Files, str]] = [
        ({weight: np.zeros((16, 24), np.float32)}, "another shape than its weight"),
        ({weight: np.zeros((24, 16), np.int8)}, "Unexpected input data type"),
        ({weight: np.zeros(24 * 16, np.float32)}, "has no weight"),
        ({table: np.zeros((1, 3, 4), np.float32)}, "too few positions"),
    ]
    for index, (files, text) in enumerate(wrong):
        with pytest.raises(BundleError, match=text):
            use(changed(bundle, tmp_path / str(index), files=files))
