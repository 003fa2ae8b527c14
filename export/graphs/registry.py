"""All graphs of a bundle, family by family. A new family is a file of this folder and a line here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from . import adamw, answer_block, block, block_decode, core, embedding, head, lora
from .golden_case import GraphWithCases, Materials

FAMILIES: Final = (lora, core, adamw, embedding, head, block, block_decode, answer_block)
KINDS: Final = tuple(kind for family in FAMILIES for kind in family.KINDS)
"""As ``graphs`` of a manifest names them."""


def make_graphs(materials: Materials) -> Iterator[GraphWithCases]:
    """Every graph of a bundle with its tests, in the order of the manifest."""
    for family in FAMILIES:
        yield from family.make(materials)
