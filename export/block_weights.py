"""The weights of the blocks that a device has, as ``.npy`` files, which it maps into memory instead of reading them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from dlora.export.graphs.block_materials import DeviceBlocks
from dlora.protocol.errors import ExportError
from dlora.protocol.manifest import BlockSpec, DeviceBlocksSpec, EntrySpec, TableSpec

from .npy_files import save_array

BLOCKS_FOLDER: Final = "blocks"


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
        save_array(bundle, saved[name], tensor.contiguous().numpy())
    return saved


def _save_table(bundle: Path, table: Tensor, saved: dict[bytes, str]) -> str:
    values = table.contiguous().numpy()
    digest = hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).digest()
    if digest not in saved:
        saved[digest] = f"{BLOCKS_FOLDER}/tables/{len(saved)}.npy"
        save_array(bundle, saved[digest], values)
    return saved[digest]
