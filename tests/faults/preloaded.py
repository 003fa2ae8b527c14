"""What the process that the others are forked from imports: everything, so that a fork has it.

The clocks come first: what keeps a reference to ``time.monotonic`` keeps one that can be shifted.
"""

from __future__ import annotations

import gc
import importlib
import os
import time
from collections.abc import Sequence
from typing import Final

_shifts: list[Sequence[float]] = [(0.0, 0.0)]
_wall, _monotonic = time.time, time.monotonic


def apply_clock_shift(shifts: Sequence[float]) -> None:
    """Take the wall clock's and the monotonic clock's shift, in seconds, from here from now on."""
    _shifts[0] = shifts


time.time = lambda: _wall() + _shifts[0][0]
time.monotonic = lambda: _monotonic() + _shifts[0][1]
# What it guards against is a power cut, which nothing here is; and it is half of a tiny run's time.
os.fsync = lambda descriptor: None  # type: ignore[assignment]

MODULES: Final = (
    "torch", "transformers.models.llama.modeling_llama", "transformers.masking_utils", "onnxruntime", "jinja2",
    "rich.console", "rich.progress", "rich.table", "pydantic.fields", "typer._adapters",
    "dlora.cloud.commands.app", "dlora.cloud.model.base_model", "dlora.cloud.serving.server",
    "dlora.edge.commands.app", "dlora.edge.run.display", "dlora.edge.data.tokenizer", "dlora.edge.run.run",
)  # fmt: skip
for _name in MODULES:
    try:
        importlib.import_module(_name)
    except ImportError:
        continue  # of another version; whoever needs it will import what there is
gc.collect()
gc.freeze()  # a fork need not go through all that again, as the device does once it has its data
