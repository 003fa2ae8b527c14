"""What a run needs of the world, looked at before anything is computed: its directory, its disk, its server."""

from __future__ import annotations

import shutil
from pathlib import Path

from msgspec.structs import replace

from dlora.edge.files import check_writable, locked
from dlora.edge.training.checkpoint import KEPT, list_checkpoints
from dlora.edge.training.resolved import Resolved
from dlora.protocol.adapters import kind_of, parameter_bytes
from dlora.protocol.errors import StorageError
from dlora.protocol.manifest import Manifest
from dlora.protocol.wire_codecs import TensorRole

from .directory import CACHE, CACHES, CHECKPOINTS, check_free, run_directory


def check_place(out: Path, *, resume: bool) -> None:
    """Raise ``UsageError`` or ``StorageError`` where a run may not or cannot write into ``out``; nothing stays."""
    with run_directory(out), locked(out):
        check_free(out, resume=resume)
        check_writable(out)


def check_room(out: Path, needed_bytes: int) -> None:
    """Raise ``StorageError`` where the disk of ``out``, which may not be there yet, has less than that free; what an
    earlier run kept there of the server's answers counts as free, for it is written anew."""
    free = shutil.disk_usage(next(each for each in (out, *out.absolute().parents) if each.exists())).free
    free += sum((out / name).stat().st_size for name in CACHES if (out / name).is_file())
    if free < needed_bytes:
        raise StorageError(
            f"--out {out} has room for {free / 1e6:,.1f} MB, and the run needs {needed_bytes / 1e6:,.1f} MB for its "
            "checkpoints and its adapter; free space or choose another place"
        )


def run_bytes(config: Resolved, manifest: Manifest, *, resume: bool) -> int:
    """What checkpoints and adapter of a run take on the disk, at most, while the newest are written beside the old.

    What a run that goes on has written is not counted.
    """
    spec, groups, kind = config.spec, config.groups(manifest), kind_of(config.spec)
    codec = config.codecs.of(TensorRole.ADAPTER_STATE)
    # The device's copy of what the server keeps, as it crosses.
    kept = sum(codec.nbytes(*shape) for group in groups for shape in kind.state_shapes(spec, group))
    trained = sum(parameter_bytes(spec, group) for group in groups)
    # Where the kind is not LoRA, its own parts lie beside the LoRA that it comes to.
    lora = sum(parameter_bytes(replace(spec, kind="lora"), group) for group in groups)
    checkpoint, adapter = 3 * trained + kept, lora + (0 if spec.kind == "lora" else trained + kept)
    if resume:
        return checkpoint + adapter
    adapters = 2 if config.saving.keep == "best" else 1
    return (KEPT + 1) * checkpoint + (adapters + 1) * adapter


def asks_server_first(config: Resolved, *, resume: bool) -> bool:
    """Whether a run begins with its server. One that goes on waits for it, or has all that it needs of it."""
    out = config.saving.out
    assert out is not None
    if not config.needs_server or (resume and list_checkpoints(out / CHECKPOINTS)):
        return False
    return not (config.asks_once and (out / CACHE).exists())
