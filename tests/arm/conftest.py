"""Puts this folder's helper modules on the path, as tests/conftest.py does for its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from arm_place import Place, tiny_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with tiny_place(tmp_path_factory.mktemp("arm")) as made:
        yield made
