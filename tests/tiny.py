"""A tiny base model, what lies on disk of it and its bundle, each made once a test run: the fixture ``tiny``.

All tests of all test processes share them, so they must not change them; a test that does harm to a bundle copies it
first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from dlora.protocol.choices import WeightFormat
from dlora.protocol.manifest import load_manifest

# torch is loaded by the first test that needs a model: this module comes with every test, and most need none.
if TYPE_CHECKING:
    from dlora.cloud.model.base_model import BaseModel
    from dlora.protocol.manifest import StoredDtype


@dataclass
class Weights:
    """A model of random weights: in memory, and as ``save_pretrained`` writes it."""

    directory: Path
    family: str
    seed: int
    changes: dict[str, Any]
    weight_format: WeightFormat = "full"

    @cached_property
    def base(self) -> BaseModel:
        from families import tiny_model

        from dlora.cloud.model.base_model import BaseModel
        from dlora.cloud.model.low_bits import hold_in_low_bits

        model = tiny_model(self.family, self.seed, **self.changes)
        hold_in_low_bits(model, self.weight_format)
        return BaseModel.from_model(model, "tiny", self.weight_format)

    @cached_property
    def model(self) -> Path:
        from families import save_tiny

        with only_one(self.directory):
            if not self.directory.exists():
                partial = self.directory.with_name("partial")
                save_tiny(partial, self.family, self.seed, **self.changes)
                partial.rename(self.directory)
        return self.directory


@dataclass
class Tiny:
    """A model and a bundle of it; each is made when it is first asked for."""

    weights: Weights
    directory: Path
    settings: dict[str, Any]

    @property
    def base(self) -> BaseModel:
        """Not to be changed."""
        return self.weights.base

    @property
    def model(self) -> Path:
        """A directory; not to be changed."""
        return self.weights.model

    @cached_property
    def bundle(self) -> Path:
        """A directory; not to be changed."""
        from dlora.export.bundle import export_bundle
        from dlora.export.settings import ExportSettings

        model = str(self.model)
        with only_one(self.directory):
            if not self.directory.exists():  # it comes whole
                export_bundle(ExportSettings(model, self.directory, **self.settings))
        return self.directory

    def check_unchanged(self) -> None:
        """Every file of a bundle is what its manifest says."""
        if "bundle" in vars(self):
            for name, spec in load_manifest(self.bundle).files.items():
                assert hashlib.sha256((self.bundle / name).read_bytes()).hexdigest() == spec.sha256, (
                    f"a test changed {name} of the bundle that all tests share"
                )


class TinyFactory:
    """Gives the ``Tiny`` of its arguments: the same one each time. All of it lies under ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._weights: dict[Hashable, Weights] = {}
        self._made: dict[Hashable, Tiny] = {}

    def __call__(
        self,
        family: str = "llama",
        *,
        blocks: int = 2,
        rank: int = 4,
        alpha: float = 8.0,
        head_dtype: StoredDtype = "fp16",
        embedding_dtype: StoredDtype | None = None,
        target_modules: tuple[str, ...] | None = None,
        engine: Literal["onnx", "executorch", "both"] = "onnx",
        device_blocks: int = 0,
        block_dtype: StoredDtype = "fp32",
        seed: int = 0,
        weight_format: WeightFormat = "full",
        **changes: Any,
    ) -> Tiny:
        """``changes`` go to the config of the model."""
        if blocks != 2:
            changes["num_hidden_layers"] = blocks
        on_disk = (family, seed, *sorted(changes.items()))
        model = (*on_disk, weight_format)
        if model not in self._weights:
            directory = self._directory / f"weights-{_digest(on_disk)}" / "model"
            self._weights[model] = Weights(directory, family, seed, changes, weight_format)
        settings = {
            "rank": rank, "alpha": alpha, "head_dtype": head_dtype, "target_modules": target_modules, "engine": engine,
            "device_blocks": device_blocks, "block_dtype": block_dtype, "embedding_dtype": embedding_dtype,
            "weight_format": weight_format,
        }  # fmt: skip
        key = model, *settings.values()
        if key not in self._made:
            self._made[key] = Tiny(self._weights[model], self._directory / f"bundle-{_digest(key)}", settings)
        return self._made[key]

    def check_unchanged(self) -> None:
        for tiny in self._made.values():
            tiny.check_unchanged()


def _digest(key: Hashable) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:12]


def only_one(directory: Path) -> FileLock:
    """Of all test processes."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(directory.with_name(f"{directory.name}.lock"))
