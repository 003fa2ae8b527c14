"""A run's directory: made, and looked into for what it is to go on from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from dlora.edge.files import make_directory
from dlora.edge.model.held_cache import held_path
from dlora.edge.training.checkpoint import Checkpoint, list_checkpoints, load_latest
from dlora.protocol.adapter_record import WEIGHTS_NAME
from dlora.protocol.errors import UsageError

from .run_file import RUN_FILE

CHECKPOINTS: Final = "checkpoints"
CACHE: Final = "trunk-cache.bin"
HELD_CACHE: Final = held_path(Path(CACHE)).name


@contextlib.contextmanager
def run_directory(out: Path) -> Iterator[None]:
    """A run's directory; one that is made here and stays empty is taken away again."""
    is_new = not out.exists()
    make_directory(out)
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # there is something in it
                out.rmdir()


def find_checkpoint(out: Path, *, resume: bool, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from; raises ``UsageError`` where a run is there that nobody asked to go on with."""
    directory = out / CHECKPOINTS
    if not resume:
        if list_checkpoints(directory):
            raise UsageError(f"{out} holds a run already; go on with dlora-edge resume {out}, or choose another --out")
        _refuse_to_replace(out)
        return None
    checkpoint = load_latest(directory, warn=warn)
    if checkpoint is None:
        _refuse_to_replace(out)
        warn(f"no checkpoint in {out}: starting from step 0")
    return checkpoint


def _refuse_to_replace(out: Path) -> None:
    """Raise ``UsageError`` where a new run might replace files that are not those of a run that came to nothing."""
    if (out / WEIGHTS_NAME).exists():
        raise UsageError(f"{out} holds an adapter that has no checkpoint; choose another --out")
    caches = (CACHE, HELD_CACHE)
    others = [path.name for path in out.iterdir() if not path.name.startswith(".") and path.name not in caches]
    if others and not (out / RUN_FILE).exists():
        raise UsageError(f"{out} is not empty and holds no run; choose another --out")
