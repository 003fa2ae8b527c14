"""Bundles with blocks for a device, and which families can have them."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from families import MORE_FAMILIES, tiny_model
from tiny import TinyFactory

from dlora.cloud.model.base_model import BaseModel
from dlora.export.device_blocks import prepare_blocks
from dlora.export.graphs.adamw import adamw_graph
from dlora.export.graphs.block_materials import DeviceBlocks
from dlora.export.graphs.graph import TrainingGraph
from dlora.export.installed import check_executorch
from dlora.export.selection import select_targets
from dlora.export.to_executorch import bounds_for, to_executorch
from dlora.protocol.manifest import MANIFEST_NAME, ExecutorchSpec, FileSpec, Manifest, encode_manifest, load_manifest

_EXPERTS: Final = "is a mixture of experts"
_NO_MASK: Final = "takes no attention mask"
REFUSED: Final = {
    **dict.fromkeys(
        (
            "glm4_moe", "gpt_oss", "granitemoe", "jamba", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
            "qwen3_next",
        ),
        _EXPERTS,
    ),
    **dict.fromkeys(("falcon_mamba", "mamba", "openai-gpt"), _NO_MASK),
    "falcon_h1": "cannot be traced",
}  # fmt: skip
"""Families whose blocks a device cannot run, and why: words of the error."""

WITHOUT_DECODE: Final = {"bloom": "cannot be traced with a cache"}
"""Families whose blocks a device can train, and not go on with from earlier tokens, and why: words of the reason."""

_WITHOUT_FIRST: Final = ("bloom", "nanochat", "opt")  # tests/test_local.py says why


def block_count(family: str) -> int:
    """How many blocks of its tiny model, of two, a device can run."""
    return 1 if family in _WITHOUT_FIRST else 2


TRIED_ALWAYS: Final = ("gemma3_text", "llama")
"""Families whose blocks are tried by ``make test``: with windows, and the plainest. Each day ``make test-slow`` tries
others."""

assert set(REFUSED) <= set(MORE_FAMILIES)


def block_bundle(tiny: TinyFactory, family: str = "llama", **settings: Any) -> Path:
    """A directory, not to be changed. ``settings``: of the export; as many blocks as there may be, in fp32, where they
    say nothing else.

    Its weights are those of ``tiny_model(family)``.
    """
    return tiny(family, **{"head_dtype": "fp32", "device_blocks": block_count(family), **settings}).bundle


Files = Mapping[str, np.ndarray[Any, Any] | bytes]


def changed(
    bundle: Path,
    copy: Path,
    change: Callable[[Manifest], Manifest] = lambda manifest: manifest,
    files: Files = {},  # noqa: B006
) -> Path:
    """A copy with another manifest and other files, arrays among them, whose digests are right."""
    shutil.copytree(bundle, copy)
    manifest = change(load_manifest(copy))
    specs = dict(manifest.files)
    for name, values in files.items():
        content = values if isinstance(values, bytes) else npy(values)
        (copy / name).write_bytes(content)
        specs[name] = FileSpec(len(content), hashlib.sha256(content).hexdigest())
    (copy / MANIFEST_NAME).write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=specs)))
    return copy


def npy(values: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def with_last_blocks(bundle: Path, copy: Path, count: int) -> Path:
    """A copy for a device that can run fewer blocks, as if it had been exported so."""

    def change(manifest: Manifest) -> Manifest:
        assert manifest.device_blocks is not None
        blocks = manifest.device_blocks.blocks
        spec = msgspec.structs.replace(manifest.device_blocks, blocks=blocks[len(blocks) - count :])
        return msgspec.structs.replace(manifest, device_blocks=spec)

    return changed(bundle, copy, change)


@cache
def prepared(family: str, count: int = 0, dtype: Any = "fp32") -> DeviceBlocks:
    """The last blocks of a tiny model, 0: as many as there may be, their graphs not yet verified."""
    base = BaseModel.from_model(tiny_model(family), family)
    trainable = select_targets(base, None).trainable
    return prepare_blocks(base, trainable, count or block_count(family), dtype, lambda _: None)


def graphs_of(blocks: DeviceBlocks) -> list[TrainingGraph]:
    """Each once."""
    each = [
        graph
        for block in blocks.blocks
        for graph in (block.forward, block.backward, block.decode, *(block.answers or ()), block.first_rows)
    ]
    last = blocks.last_forward, blocks.last_backward, blocks.last_first_rows
    named = {graph.name: graph for graph in (*each, *last) if graph is not None}
    return [*named.values(), blocks.final_norm.forward, blocks.final_norm.backward]


def with_programs(bundle: Path, family: str, dtype: Any = "fp32") -> Path:
    """A copy that has ExecuTorch's programs of its blocks and of AdamW, and no other graphs: a head takes long."""
    copy = bundle.with_name(f"{bundle.name}-with-programs")
    copy.mkdir()
    for path in bundle.rglob("*"):
        if path.is_file() and path.name != MANIFEST_NAME:
            (copy / path.relative_to(bundle)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(bundle)).hardlink_to(path)
    manifest = load_manifest(bundle)
    graphs, files = [], dict(manifest.files)
    blocks = prepared(family, 0, dtype)
    bounds = bounds_for(blocks.max_length)
    for graph in (*graphs_of(blocks), adamw_graph()):
        content, name = to_executorch(graph, bounds), f"graphs/{graph.name}.pte"
        (copy / name).write_bytes(content)
        files[name] = FileSpec(len(content), hashlib.sha256(content).hexdigest())
        spec = manifest.graph(graph.kind, graph.key)
        graphs.append(msgspec.structs.replace(spec, files={**spec.files, "executorch": name}))
    made_with = ExecutorchSpec(check_executorch(), bounds)
    changed: Manifest = msgspec.structs.replace(manifest, graphs=tuple(graphs), files=files, executorch=made_with)
    (copy / MANIFEST_NAME).write_bytes(encode_manifest(changed))
    return copy


def stored_as(weights: Mapping[str, Any], name: str) -> torch.Tensor:
    """The weight (out, in) that a device computes with, in float32, of what it has on its disk."""
    groups = weights.get(f"{name}.weight.group_scales")
    if groups is not None:
        packed = weights[f"{name}.weight"].astype(np.int16)
        values = np.concatenate([(packed & 15) - 8, packed >> 4], axis=2) * groups.astype(np.float32)
        return torch.from_numpy(values.reshape(len(values), -1))
    weight = torch.from_numpy(weights[f"{name}.weight"].copy()).float()
    scales = weights.get(f"{name}.weight.row_scales")
    return weight if scales is None else weight * torch.from_numpy(scales.copy())[:, None]
