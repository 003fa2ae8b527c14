"""What a process says of its own memory, and what it lets go of."""

from __future__ import annotations

import mmap
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny import TinyFactory

from dlora.cloud.model.memory import machine_bytes
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.ends import Embedding


def printed(code: str) -> str:
    """What a program prints, in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_peak_memory_excludes_the_parent_process() -> None:
    """Linux hands ``ru_maxrss`` down through exec: a small device started by a large test run looked large."""
    ours = np.ones(500 * 10**6, np.uint8)
    code = "from dlora.edge.memory import peak_rss_mb; print(peak_rss_mb())"
    assert 5 < float(printed(code)) < 250
    assert ours[-1] == 1


def test_peak_memory_stays_after_release() -> None:
    code = (
        "from dlora.edge.memory import peak_rss_mb; import numpy as np\n"
        "before = peak_rss_mb(); held = np.ones(300 * 10**6, np.uint8); del held; print(peak_rss_mb() - before)"
    )
    assert 290 < float(printed(code)) < 320


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep what is mapped")
def test_a_released_weight_leaves_memory_and_reads_the_same(tiny: TinyFactory, tmp_path: Path) -> None:
    shutil.copytree(tiny().bundle, tmp_path / "bundle")
    large = np.ones((1 << 12, 1 << 11), np.float32)  # 34 MB
    np.save(tmp_path / "bundle" / "weights" / "embedding.npy", large)
    code = f"""
import pathlib
from dlora.edge.engine.bundle import Bundle
from dlora.protocol.manifest import load_manifest
bundle = Bundle(pathlib.Path({str(tmp_path / "bundle")!r}), load_manifest(pathlib.Path({str(tmp_path / "bundle")!r})))
def file_mb():
    return int(pathlib.Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0]) / 1e3
weight = bundle.weight("weights/embedding.npy")
before = file_mb()
total = weight.sum()
touched = file_mb()
bundle.release("weights/embedding.npy")
print(touched - before > 30, file_mb() - before < 3, weight.sum() == total == {1 << 23})
"""
    assert printed(code).split() == ["True"] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="other systems go without")
def test_allocation_beyond_available_memory_fails() -> None:
    code = """
import psutil, resource, numpy as np
from dlora.edge.memory import limit_memory
before = resource.getrlimit(resource.RLIMIT_DATA)
size = psutil.virtual_memory().available + psutil.swap_memory().free + (1 << 30)
with limit_memory():
    held = np.empty(1 << 20, np.uint8)
    try:
        np.empty(size, np.uint8)
    except MemoryError:
        print("refused")
print(resource.getrlimit(resource.RLIMIT_DATA) == before)
"""
    assert printed(code).split() == ["refused", "True"]


@pytest.mark.parametrize(
    ("own", "limits", "wanted"),
    [
        ("0::/a/b\n", {"a/memory.max": "5000\n", "a/b/memory.max": "max\n"}, 5000),
        ("0::/a/b\n", {"a/memory.max": "5000\n", "a/b/memory.max": "4000\n"}, 4000),
        ("0::/\n", {"memory.max": "3000\n"}, 3000),
        ("3:cpu:/a\n2:memory:/a\n", {"memory/a/memory.limit_in_bytes": "2000\n", "cpu/a/memory.max": "1\n"}, 2000),
        ("0::/a\n", {"a/memory.max": "max\n"}, None),
        ("0::/a\n", {"a/memory.max": f"{1 << 62}\n"}, None),
        (None, {}, None),
    ],
)
def test_machine_bytes_respects_control_groups(
    tmp_path: Path, own: str | None, limits: dict[str, str], wanted: int | None
) -> None:
    for name, text in limits.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if own is not None:
        (tmp_path / "own").write_text(own)
    found = machine_bytes(tmp_path / "cgroup", tmp_path / "own")
    assert found == (wanted or psutil.virtual_memory().total)


def test_rows_are_read_without_their_neighbours(tiny: TinyFactory) -> None:
    """While a table is looked up in, the system is told so, and told the opposite for who reads it whole."""
    bundle = Bundle.open(tiny().bundle)
    file = bundle.manifest.embedding.weight
    weight, told = bundle.weight(file), list[int]()

    class Mapping:
        """Notes what is advised."""

        def madvise(self, advice: int) -> None:
            told.append(advice)

    bundle._weights[file] = weight, Mapping()  # type: ignore[assignment]
    Embedding(bundle, OnnxEngine(bundle))(np.array([1, 2, 3]))
    assert told == [mmap.MADV_RANDOM, mmap.MADV_NORMAL, mmap.MADV_DONTNEED]
