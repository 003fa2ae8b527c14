"""The device's weights as ``.npy`` files, which the device maps into memory instead of reading them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dlora.cloud.model.base_model import EmbeddingEnd, HeadEnd
from dlora.export.graphs.arrays import Arrays
from dlora.export.graphs.block_materials import DeviceBlocks
from dlora.export.graphs.head import CALL_ROWS
from dlora.export.tracing.modules import quantise_rows
from dlora.protocol.errors import ExportError, StorageError
from dlora.protocol.manifest import (
    BlockSpec,
    DeviceBlocksSpec,
    EmbeddingSpec,
    EntrySpec,
    HeadSpec,
    StoredDtype,
    TableSpec,
)

FOLDER: Final = "weights"
BLOCKS_FOLDER: Final = "blocks"
_EMBEDDING: Final = f"{FOLDER}/embedding.npy"
_HEAD: Final = f"{FOLDER}/head.npy"


def save_embedding(bundle: Path, end: EmbeddingEnd, head_dtype: StoredDtype) -> tuple[EmbeddingSpec, Arrays]:
    """Save the table; returns its spec and the inputs that the embedding graph takes from it."""
    # A look-up in an int8 table would lose too much, so it stays in half precision.
    dtype: Literal["fp32", "fp16"] = "fp32" if head_dtype == "fp32" else "fp16"
    weight = _save(bundle, _EMBEDDING, _stored(end.weight, dtype))
    return EmbeddingSpec(_EMBEDDING, dtype, end.scale), {"weight": weight}


def save_head(bundle: Path, end: HeadEnd, dtype: StoredDtype, embedding: Arrays) -> tuple[HeadSpec, Arrays]:
    """Save the head, unless it is tied and the embedding's file serves both; returns its spec and graph inputs."""
    inputs: Arrays = {}
    weight_file = _HEAD
    row_scales = bias = None
    if dtype == "int8":
        quantised, scales = (tensor.numpy() for tensor in quantise_rows(end.weight))
        inputs["weight"] = _save(bundle, _HEAD, quantised)
        row_scales = f"{FOLDER}/head_row_scales.npy"
        inputs["row_scales"] = _save(bundle, row_scales, scales)
    elif end.tied:
        weight_file, inputs["weight"] = _EMBEDDING, embedding["weight"]
    else:
        inputs["weight"] = _save(bundle, _HEAD, _stored(end.weight, dtype))
    if end.bias is not None:
        bias = f"{FOLDER}/head_bias.npy"
        inputs["bias"] = _save(bundle, bias, _stored(end.bias, "fp32"))
    spec = HeadSpec(
        weight=weight_file,
        dtype=dtype,
        tied=end.tied,
        row_scales=row_scales,
        bias=bias,
        logit_scale=end.logit_scale,
        softcap=end.softcap,
        rows=CALL_ROWS,
    )
    return spec, inputs


def save_device_blocks(bundle: Path, blocks: DeviceBlocks) -> DeviceBlocksSpec:
    """Save the weights of blocks, their tables, of which equal ones share a file, and what stands before and after."""
    tables: dict[bytes, str] = {}
    specs = []
    for block in blocks.blocks:
        folder = f"{BLOCKS_FOLDER}/{block.call.index}"
        specs.append(
            BlockSpec(
                index=block.call.index,
                path=block.call.path,
                graph=block.key,
                window=block.window,
                weights=_save_tensors(bundle, folder, block.weights),
                tables={
                    name: TableSpec(_save_table(bundle, table, tables), axis)
                    for name, (table, axis) in block.tables.items()
                },
            )
        )
    entry = EntrySpec()
    if blocks.entry is not None:
        added = blocks.entry.positions
        entry = EntrySpec(
            blocks.entry.scale, None if added is None else TableSpec(_save_table(bundle, added, tables), axis=0)
        )
    return DeviceBlocksSpec(
        dtype=blocks.dtype,
        max_length=blocks.max_length,
        blocks=tuple(specs),
        final_norm=_save_tensors(bundle, f"{BLOCKS_FOLDER}/final_norm", blocks.final_norm.weights),
        without_decode=blocks.without_decode,
        entry=entry,
    )


def _save_tensors(bundle: Path, folder: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    saved = {}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"{name} of a block has values that its precision cannot hold; use --block-dtype fp32")
        saved[name] = f"{folder}/{name}.npy"
        _save(bundle, saved[name], tensor.contiguous().numpy())
    return saved


def _save_table(bundle: Path, table: Tensor, saved: dict[bytes, str]) -> str:
    values = table.contiguous().numpy()
    digest = hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).digest()
    if digest not in saved:
        saved[digest] = f"{BLOCKS_FOLDER}/tables/{len(saved)}.npy"
        _save(bundle, saved[digest], values)
    return saved[digest]


def _stored(tensor: Tensor, dtype: Literal["fp32", "fp16"]) -> npt.NDArray[np.generic]:
    values = tensor.to(torch.float16 if dtype == "fp16" else torch.float32)
    if not bool(torch.isfinite(values).all()):
        advice = "; use --head-dtype fp32" if dtype == "fp16" else ""
        raise ExportError(f"the embedding or head has values that {dtype} cannot hold{advice}")
    return values.contiguous().numpy()


def _save(bundle: Path, name: str, values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    path = bundle / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.save(file, values, allow_pickle=False)
    except OSError as error:  # numpy's own, of a disk that is full, has no errno
        text = f"cannot write {path}: {error.strerror or error}; free space or choose another --out"
        raise StorageError(text) from None
    return values
