"""A run's directory: made, and looked into for what it is to go on from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from dlora.edge.files import make_directory
from dlora.edge.model.kept_outputs_cache import kept_outputs_path
from dlora.edge.training.checkpoint import Checkpoint, list_checkpoints, load_latest
from dlora.protocol.adapter_record import WEIGHTS_NAME
from dlora.protocol.errors import UsageError

from .run_file import RUN_FILE

CHECKPOINTS: Final = "checkpoints"
CACHE: Final = "trunk-cache.bin"
KEPT_OUTPUTS: Final = kept_outputs_path(Path(CACHE)).name
KEPT_READS: Final = "kept-reads.bin"
CACHES: Final = (CACHE, KEPT_OUTPUTS, KEPT_READS)


@contextlib.contextmanager
def run_directory(out: Path) -> Iterator[None]:
    """A run's directory; what is made of it here, and above it, and stays empty is taken away again.

    Raises ``UsageError`` where a file is in its place, and ``StorageError``.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; choose another --out")
    missing = [each for each in (out, *out.parents) if not each.exists()]
    make_directory(out)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # there is something in it
            for each in missing:
                each.rmdir()


def find_checkpoint(out: Path, *, resume: bool, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from; raises ``UsageError`` where a run is there that nobody asked to go on with."""
    check_free(out, resume=resume)
    if not resume:
        return None
    checkpoint = load_latest(out / CHECKPOINTS, warn=warn)
    if checkpoint is None:
        warn(f"no checkpoint in {out}: starting from step 0")
    return checkpoint


def check_free(out: Path, *, resume: bool) -> None:
    """Raise ``UsageError`` where a run is there that nobody asked to go on with, or files that are not those of a run
    that came to nothing."""
    if list_checkpoints(out / CHECKPOINTS):
        if not resume:
            raise UsageError(f"{out} holds a run already; go on with dlora-edge resume {out}, or choose another --out")
        return
    if (out / WEIGHTS_NAME).exists():
        raise UsageError(f"{out} holds an adapter that has no checkpoint; choose another --out")
    others = [path.name for path in out.iterdir() if not path.name.startswith(".") and path.name not in CACHES]
    if others and not (out / RUN_FILE).exists():
        raise UsageError(f"{out} is not empty and holds no run; choose another --out")
