"""A tiny bundle for both engines, exported once a test run, and copies of it with something wrong."""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from families import save_tiny

from dlora.edge.engine import choose as engines
from dlora.export.bundle import ExportSettings, export_bundle
from dlora.protocol.manifest import MANIFEST_NAME, FileSpec, Manifest, encode_manifest, load_manifest

NEEDED = [
    pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="executorch is not installed"),
    pytest.mark.skipif(not engines.is_installed("executorch"), reason="there is no shim: make shim"),
]


@cache
def tiny_bundle() -> Path:
    """Of a llama, rank 4, fp32 head, for both engines; read only."""
    directory = Path(tempfile.mkdtemp(prefix="dlora-executorch-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    save_tiny(directory / "model")
    export_bundle(
        ExportSettings(
            str(directory / "model"), directory / "bundle", rank=4, alpha=8.0, head_dtype="fp32", engine="both"
        )
    )
    return directory / "bundle"


def copied(bundle: Path, copy: Path, **changes: Any) -> Path:
    """A copy whose manifest says something else."""
    shutil.copytree(bundle, copy)
    changed: Manifest = msgspec.structs.replace(load_manifest(copy), **changes)
    (copy / MANIFEST_NAME).write_bytes(encode_manifest(changed))
    return copy


def with_program(bundle: Path, copy: Path, name: str, content: bytes) -> Path:
    """A copy with another program in one place, and the digest that belongs to it."""
    spec = FileSpec(len(content), hashlib.sha256(content).hexdigest())
    copied(bundle, copy, files={**load_manifest(bundle).files, name: spec})
    (copy / name).write_bytes(content)
    return copy


def program(bundle: Path, kind: str) -> tuple[str, bytes]:
    """Path in the bundle, and content, of the first program of a kind."""
    spec = next(graph for graph in load_manifest(bundle).graphs if graph.kind == kind)
    name = spec.files["executorch"]
    return name, (bundle / name).read_bytes()
