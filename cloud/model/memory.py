"""Memory: how much there is, giving back what sessions leave behind, and knowing when there is none left."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

_M_ARENA_MAX: Final = -8  # of glibc's <malloc.h>
_ARENAS: Final = 2
_CGROUPS: Final = Path("/sys/fs/cgroup")
_OUT_OF_MEMORY: Final = ("can't allocate memory", "out of memory")  # of torch's RuntimeErrors; the CPU's has no type


def machine_bytes(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Memory of this machine, or what this process's control groups leave it: a container's or a service's limit.

    Args:
        cgroups: where control groups are mounted; own: which ones this process is in. Version 2 of them, or 1.
    """
    limits: list[int] = [psutil.virtual_memory().total]
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        root, name = (cgroups, "memory.max") if not controllers else (cgroups / "memory", "memory.limit_in_bytes")
        if controllers in ("", "memory"):
            group = Path(path.lstrip("/"))
            for parent in (group, *group.parents):
                limit = root / parent / name
                text = limit.read_text().strip() if limit.exists() else "max"
                limits += [int(text)] if text.isdecimal() else []
    return min(limits)


def limit_arenas() -> None:
    """Let all threads share two of glibc's heaps. Call it before there are threads.

    By itself glibc makes one for each thread, up to eight a core. Each keeps the largest step that it ever saw, and a
    session has a thread of its own.
    """
    with suppress(AttributeError):  # neither musl nor macOS has it
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)


def release_freed_memory() -> None:
    """Give freed memory back to the system.

    A session's activations come in pieces that the next one's do not fit into, and glibc keeps them: a server of
    SmolLM2-135M that had run some fifty sessions stood at 4.2 GB, of which this gave back 2.7.
    """
    with suppress(AttributeError):  # likewise
        ctypes.CDLL(None).malloc_trim(0)


def collect_garbage() -> None:
    """Give back what nobody can reach any more, too: websockets' connections are cycles, and hold their last frame.

    Python looks for cycles by their number, and a few that hold 50 MB each are none. It holds up every thread; call
    ``freeze_gc`` once, so that it is quick.
    """
    gc.collect()
    release_freed_memory()


def freeze_gc() -> None:
    """Leave out what is there now, such as a model and its libraries, when cycles are looked for."""
    gc.collect()
    gc.freeze()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, Python's, torch's or the GPU's."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    )
