"""docs/reference/models.md says of each family and of every other causal model type of transformers what its tiny model
does."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from block_bundles import TRIED_ALWAYS
from drawn import one_in
from families import FAMILIES, MORE_FAMILIES, REFUSED_FAMILIES
from model_types import MOST, OUTCOMES, other_types, page_rows, page_version, row_of, trial_of, try_in, type_of
from models_table import PAGE, accepted, refused, rows_below

NO_CAUSAL_TYPES = ("t5",)
# One or two that work, two or three that are refused: fifteen seconds.
DRAWN = [*one_in(60, page_rows("works")), *one_in(20, page_rows("refused"))]
OTHERS = "docs/reference/models.md is stale: python tests/model_types.py"
STALE = "docs/reference/models.md is stale: python tests/models_table.py"


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, *REFUSED_FAMILIES])
def test_family_is_in_the_docs(family: str) -> None:
    line = refused(family) if family in REFUSED_FAMILIES else accepted(family)
    assert line in PAGE.read_text().splitlines(), STALE


def test_docs_list_no_other_family() -> None:
    tested = len(FAMILIES) + len(MORE_FAMILIES)
    assert len(rows_below("| family | LoRA's default")) == tested, STALE
    assert len(rows_below("| family | error")) == len(REFUSED_FAMILIES), STALE
    text = PAGE.read_text()
    assert f"{tested} families are tested" in text
    assert f"{', '.join(TRIED_ALWAYS)}; `make test-slow`" in text


def test_every_model_type_of_transformers_has_a_row() -> None:
    """Of the transformers that the page was made with; what a later one has more is not known there."""
    rows = {type_of(row) for outcome in OUTCOMES for row in page_rows(outcome)}
    missing = set(other_types()) - rows
    rows |= {*FAMILIES, *MORE_FAMILIES, *REFUSED_FAMILIES}
    assert not missing or transformers.__version__ != page_version(), OTHERS
    assert f"has {len(rows) - len(NO_CAUSAL_TYPES)} causal model types" in PAGE.read_text(), OTHERS


@pytest.mark.parametrize("row", DRAWN, ids=type_of)
def test_a_drawn_type_gives_its_row(row: str, tmp_path: Path) -> None:
    if transformers.__version__ != page_version():
        pytest.skip("the page was made with another transformers")
    trial = trial_of(row)
    result = try_in(trial, tmp_path)
    if result.outcome == "works":  # the number may be another power of ten on another machine
        assert result.difference <= MOST
        row = row.rpartition(" | ")[0]
    assert row_of(trial, result).startswith(row), OTHERS
