"""The weights of the two ends that a device has, table and LM head: narrowed and written piece by piece, for either may
be larger than ten blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dlora.cloud.model.base_model import EmbeddingEnd, HeadEnd
from dlora.export.graphs.arrays import Arrays
from dlora.export.graphs.head import CALL_ROWS
from dlora.export.graphs.stored_weight import weight_inputs
from dlora.export.tracing.int4 import group_size, quantise_groups
from dlora.export.tracing.modules import quantise_rows
from dlora.protocol.errors import ExportError
from dlora.protocol.manifest import EmbeddingSpec, HeadSpec, StoredDtype

from .npy_files import save_array, save_pieces

FOLDER: Final = "weights"
_PIECE_VALUES: Final = 1 << 22  # 16 MB when wide


def save_embedding(bundle: Path, end: EmbeddingEnd, dtype: StoredDtype) -> tuple[EmbeddingSpec, Arrays]:
    """Save the table; returns its spec and the inputs that the embedding graph takes from it."""
    files, inputs = _save_weight(bundle, "embedding", end.weight, dtype)
    return EmbeddingSpec(**files, dtype=dtype, scale=end.scale), inputs


def save_head(
    bundle: Path, end: HeadEnd, dtype: StoredDtype, embedding: EmbeddingSpec, embedding_inputs: Arrays
) -> tuple[HeadSpec, Arrays]:
    """Save the head, unless it is tied and the embedding's files serve both; returns its spec and graph inputs."""
    if end.tied and dtype == embedding.dtype:
        files, inputs = embedding.weight_files, dict(embedding_inputs)
    else:
        files, inputs = _save_weight(bundle, "head", end.weight, dtype)
    if end.bias is not None:
        files = {**files, "bias": f"{FOLDER}/head_bias.npy"}
        inputs["bias"] = end.bias.float().numpy()
        save_array(bundle, files["bias"], inputs["bias"])
    spec = HeadSpec(
        **files, dtype=dtype, tied=end.tied, logit_scale=end.logit_scale, softcap=end.softcap, rows=CALL_ROWS
    )
    return spec, inputs


def _save_weight(bundle: Path, end: str, weight: Tensor, dtype: StoredDtype) -> tuple[dict[str, str], Arrays]:
    """Save a weight (rows, width); returns the files of its graph inputs, and these, mapped."""
    rows, width = weight.shape
    try:
        inputs = weight_inputs(dtype, rows, width)
    except ExportError as error:
        raise ExportError(f"the {end} cannot be stored so: {error}; use --{end}-dtype int8") from None
    files = {spec.name: f"{FOLDER}/{end}{'' if spec.name == 'weight' else f'_{spec.name}'}.npy" for spec in inputs}
    shapes = {files[spec.name]: [int(size) for size in spec.shape] for spec in inputs}

    def pieces() -> Iterator[list[Any]]:
        for rows_of_piece in weight.split(max(1, _PIECE_VALUES // width)):
            narrow = _narrow(rows_of_piece, dtype)
            if not bool(torch.isfinite(narrow[-1]).all()):
                advice = "" if dtype == "fp32" else f"; use --{end}-dtype fp32"
                raise ExportError(f"the {end} has values that {dtype} cannot hold{advice}")
            yield [tensor.numpy() for tensor in narrow]

    saved = save_pieces(bundle, shapes, pieces())
    return files, {name: saved[file] for name, file in files.items()}


def _narrow(rows: Tensor, dtype: StoredDtype) -> tuple[Tensor, ...]:
    """The graph inputs that rows (rows, width) are, those whose values may be infinite last."""
    if dtype == "int8":
        return quantise_rows(rows)
    size = group_size(rows.shape[1])
    if dtype == "int4" and size is not None:
        return quantise_groups(rows, size)
    return (rows.to(torch.float16 if dtype == "fp16" else torch.float32),)
