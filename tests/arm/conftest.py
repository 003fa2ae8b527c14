"""Puts this folder's helper modules on the path. The arm root, where there is no torch, reads this too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from arm_place import Place

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    from arm_place import tiny_place

    with tiny_place(tmp_path_factory.mktemp("arm")) as made:
        yield made
