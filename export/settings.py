"""What is to be made, and whether it can be: without loading torch, so that a mistake is an error at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from dlora.cloud.model.source import find_source
from dlora.protocol.choices import WeightFormat
from dlora.protocol.errors import UsageError
from dlora.protocol.limits import MAX_RANK
from dlora.protocol.manifest import StoredDtype
from dlora.protocol.text import one_line

from .adapter_files import AdapterFiles, check_mergeable
from .installed import check_executorch
from .output_directory import Product, check_output_path

MERGED_NAME: Final = "dlora_merge.json"
MERGED: Final = Product("a merged model", MERGED_NAME)
ENGINES: Final = ("onnx", "executorch")


def parse_device_blocks(text: str | None) -> int | Literal["all"] | None:
    """What ``--device-blocks`` says: a number, ``all``, ``none``. Raises ``UsageError``."""
    words: dict[str, Literal["all"] | int] = {"all": "all", "none": 0}
    if text is None or text in words:
        return None if text is None else words[text]
    if not (text.isascii() and text.isdecimal() and len(text) < 7):
        raise UsageError(
            "--device-blocks must be at least 0: a number of blocks, counted from the last; or all, or none"
        )
    return int(text)


@dataclass(frozen=True)
class ExportSettings:
    """What the user asked for.

    Attributes:
        rank, alpha, target_modules: LoRA's defaults in training; target_modules None is the architecture's default.
        base_model_name: what adapters call their base model; None means its hub id, or ``model`` where it has none.
        device_blocks: how many of the last blocks a device may run itself, or ``all``; None: what ``device_memory``
            holds.
        device_memory: bytes of a device that is to train with as many of the last blocks as it holds; None: none.
        embedding_dtype: of the token embedding; None: fp32 with a head of fp32, else fp16.
        block_dtype: how the blocks' weights are stored.
        weight_format: how the server holds those of its linear modules; the bundle is of what they are then.
    """

    model: str
    out: Path
    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] | None = None
    head_dtype: StoredDtype = "fp16"
    force: bool = False
    engine: Literal["onnx", "executorch", "both"] = "onnx"
    base_model_name: str | None = None
    device_blocks: int | Literal["all"] | None = None
    block_dtype: StoredDtype = "fp16"
    device_memory: float | None = None
    embedding_dtype: StoredDtype | None = None
    weight_format: WeightFormat = "full"

    @property
    def dtype_of_embedding(self) -> StoredDtype:
        """What ``embedding_dtype`` says, or what it is by default."""
        return self.embedding_dtype or ("fp32" if self.head_dtype == "fp32" else "fp16")

    @property
    def engines(self) -> tuple[str, ...]:
        """The names of the engines that the bundle is for."""
        return ENGINES if self.engine == "both" else (self.engine,)

    def check(self) -> None:
        """Raise ``UsageError``, ``StorageError`` or ``MissingExtraError`` for settings that cannot work."""
        if not 1 <= self.rank <= MAX_RANK:
            raise UsageError(f"--rank must be at least 1 and at most {MAX_RANK}")
        if not 0 < self.alpha < float("inf"):
            raise UsageError("--alpha must be above 0")
        if self.target_modules is not None and not self.target_modules:
            raise UsageError("--target-modules is empty; name some, separated by commas, or leave it out")
        if self.base_model_name is not None and not one_line(self.base_model_name).strip():
            raise UsageError("--base-model-name is empty; give a hub id (org/name), or leave it out")
        if self.device_blocks is not None and self.device_memory is not None:
            raise UsageError("--device-blocks and --device-memory both say how many blocks there are to be; give one")
        check_output_path(self.out, self.force)
        if "executorch" in self.engines:
            check_executorch()
        find_source(self.model)


@dataclass(frozen=True)
class MergeSettings:
    """What the user asked to be merged; ``dtype``: a name of torch's, of the weights that are written."""

    model: str
    adapter: Path
    out: Path
    dtype: str = "float32"
    force: bool = False

    def check(self) -> AdapterFiles:
        """The adapter, whose files fit together.

        Raises ``UsageError``, ``StorageError``, ``MissingExtraError`` or ``CheckpointError`` for what cannot work.
        """
        if self.out.exists() and self.out.resolve() == self.adapter.resolve():
            raise UsageError(f"{self.out} is the adapter; choose another --out")
        check_output_path(self.out, self.force, MERGED)
        adapter = check_mergeable(self.adapter)
        find_source(self.model)
        return adapter
