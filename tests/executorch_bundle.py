"""Copies of a bundle for ExecuTorch with something wrong, and what such tests need."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from dlora.edge.engine import choose as engines
from dlora.protocol.manifest import MANIFEST_NAME, FileSpec, Manifest, encode_manifest, load_manifest

NEEDED = [
    pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="executorch is not installed"),
    pytest.mark.skipif(not engines.is_installed("executorch"), reason="there is no shim: make shim"),
]

FEW_SHAPES: Final = {"intermediate_size": 16}
"""Of a model whose modules are of two shapes, one of them not square: a program takes a second to make."""


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
