"""What is to be merged, and whether it can be: without loading torch, so that a mistake is an error at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dlora.cloud.model.source import find_source
from dlora.protocol.errors import UsageError

from .adapter_files import AdapterFiles, check_mergeable
from .output_directory import Product, check_output_path

MERGED_NAME: Final = "dlora_merge.json"
MERGED: Final = Product("a merged model", MERGED_NAME)


@dataclass(frozen=True)
class MergeSettings:
    """What the user asked for; ``dtype``: a name of torch's, of the weights that are written."""

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
