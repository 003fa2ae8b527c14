"""The weights of the two ends that a device has, table and LM head: narrowed and written piece by piece, for either may
be larger than ten blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from dlora.cloud.model.base_model import EmbeddingEnd, HeadEnd
from dlora.export.graphs.arrays import Arrays
from dlora.export.graphs.head import CALL_ROWS
from dlora.export.graphs.stored_weight import weight_inputs
from dlora.export.tracing.int4 import quantise_groups
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
    narrow = _narrowing(end, dtype, width // shapes[files["weight"]][1])
    pieces = ([tensor.numpy() for tensor in narrow(piece)] for piece in weight.split(max(1, _PIECE_VALUES // width)))
    saved = save_pieces(bundle, shapes, pieces)
    return files, {name: saved[file] for name, file in files.items()}


def _narrowing(end: str, dtype: StoredDtype, size: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """What makes graph inputs of rows; ``size``: of groups."""
    if dtype == "int8":
        return quantise_rows
    if dtype == "int4":
        return partial(_checked_groups, end, size)
    return partial(_checked_floats, end, torch.float16 if dtype == "fp16" else torch.float32)


def _checked_groups(end: str, size: int, rows: Tensor) -> tuple[Tensor, ...]:
    values, scales = quantise_groups(rows, size)
    _check(end, "int4", scales)
    return values, scales


def _checked_floats(end: str, dtype: torch.dtype, rows: Tensor) -> tuple[Tensor, ...]:
    values = rows.to(dtype)
    _check(end, "fp16" if dtype == torch.float16 else "fp32", values)
    return (values,)


def _check(end: str, dtype: StoredDtype, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        advice = "" if dtype == "fp32" else f"; use --{end}-dtype fp32"
        raise ExportError(f"the {end} has values that {dtype} cannot hold{advice}")
