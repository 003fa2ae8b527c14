"""What tests of ExecuTorch need."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

import pytest

from dlora.edge.engine import choose as engines
from dlora.protocol.manifest import load_manifest

NEEDED = [
    pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="executorch is not installed"),
    pytest.mark.skipif(not engines.is_installed("executorch"), reason="there is no shim: make shim"),
]

FEW_SHAPES: Final = {"intermediate_size": 16}
"""Of a model whose modules are of two shapes, one of them not square: a program takes a second to make."""


def program(bundle: Path, kind: str) -> tuple[str, bytes]:
    """Path in the bundle, and content, of the first program of a kind."""
    spec = next(graph for graph in load_manifest(bundle).graphs if graph.kind == kind)
    name = spec.files["executorch"]
    return name, (bundle / name).read_bytes()
