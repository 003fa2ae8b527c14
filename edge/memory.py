"""This process's memory: how much it took at most, and giving back what is no longer needed."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

MANY_TOKENS: Final = 32  # a prompt, and no draft: giving memory back takes a millisecond


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, in megabytes (10**6 bytes), mapped weights included.

    Linux hands ``ru_maxrss`` down through fork and exec: a device started by a large process would report that
    one's memory. ``VmHWM`` belongs to this program alone.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:", 1)[1].split("kB", 1)[0]) * 1024 / 1e6
    except (OSError, IndexError, ValueError):  # not Linux, or a /proc without it
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def _find_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        return found
    except (AttributeError, OSError):  # musl, macOS
        return None


_trim = _find_trim()


def release_freed_memory() -> None:
    """Give freed memory back to the system; about a millisecond.

    glibc keeps what large tensors leave behind, in pieces that the next ones may not fit into: on SmolLM2 that
    was 60 MB, a quarter of the whole process.
    """
    if _trim is not None:
        _trim(0)


@contextmanager
def limit_memory() -> Iterator[None]:
    """Within, an allocation above the free memory fails at once; else Linux grants it, and kills the process later.

    About 0.1 ms. Other systems go without.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        machine = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        spare = sum(int(machine[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
        ours = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except (OSError, LookupError, ValueError):  # not Linux
        yield
        return
    most = ours + spare
    resource.setrlimit(resource.RLIMIT_DATA, (most if soft == resource.RLIM_INFINITY else min(most, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
