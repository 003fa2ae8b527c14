"""Blocks at the last rows of texts give what they give among all rows, of every family that keeps keys and values."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, MORE_FAMILIES, tiny_model
from test_parts import WITHOUT_CACHE, deeper

from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.model.layout import is_near
from dlora.cloud.model.parts import ModelParts
from dlora.cloud.model.row_blocks import DividedTexts, RowBlocks
from dlora.protocol.errors import ExportError

TEXTS = DividedTexts((19, 5, 3, 7, 1), (13, 0, 2, 3, 0))
"""Of the longest, first rows are more than the windows of families that have one."""
WITHOUT_ROWS = (*WITHOUT_CACHE, "mpt")
"""``mpt`` looks up a bias by how many keys a block sees, and they are those of one text."""


def check_last_rows(base: BaseModel) -> None:
    embeds = torch.randn(sum(TEXTS.lengths), base.embedding_size)
    texts = zip(embeds.split(TEXTS.lengths), TEXTS.firsts, strict=True)
    with torch.no_grad():
        wanted = torch.cat([base.last_hidden_state(text[None].clone())[:, first:] for text, first in texts], 1)
    blocks = RowBlocks(ModelParts(base))
    for lowest in range(base.blocks):
        last_rows = blocks.begin(embeds.clone(), TEXTS, lowest)
        found = last_rows.run(requires_grad=True)
        assert is_near(found, wanted), lowest
        assert torch.equal(found, last_rows.run()), "the same again"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITHOUT_ROWS])
def test_last_rows_alone_are_as_among_all(family: str) -> None:
    check_last_rows(deeper(family))


@pytest.mark.parametrize("family", [family for family in MORE_FAMILIES if family not in WITHOUT_ROWS])
def test_last_rows_of_more_families_are_as_among_all(family: str) -> None:
    check_last_rows(BaseModel.from_model(tiny_model(family), family))


@pytest.mark.parametrize("family", WITHOUT_ROWS)
def test_families_whose_blocks_need_more_than_rows_are_refused(family: str) -> None:
    base = BaseModel.from_model(tiny_model(family), family)
    with pytest.raises(ExportError, match="cannot be run at some rows"):
        RowBlocks(ModelParts(base))
    assert RowBlocks.of(ModelParts(base)) is None


def test_rows_lie_where_they_are_packed() -> None:
    texts = DividedTexts((4, 2), (3, 0))
    assert texts.among_all(texts.first_rows).tolist() == [0, 1, 2]
    assert texts.among_all(texts.last_rows).tolist() == [3, 4, 5]
