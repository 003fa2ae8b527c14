"""docs/models.md says of each family what its tiny model does."""

from __future__ import annotations

import pytest
from families import FAMILIES, MORE_FAMILIES, REFUSED_FAMILIES
from models_table import PAGE, accepted, refused

STALE = "docs/models.md is stale: python tests/models_table.py"


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_working_family_is_in_the_docs(family: str) -> None:
    assert accepted(family) in PAGE.read_text().splitlines(), STALE


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_refused_family_is_in_the_docs(family: str) -> None:
    assert refused(family) in PAGE.read_text().splitlines(), STALE


def test_docs_list_no_other_family() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "family" not in line]
    assert len(rows) == len(FAMILIES) + len(MORE_FAMILIES) + len(REFUSED_FAMILIES), STALE
