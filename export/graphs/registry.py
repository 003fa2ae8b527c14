"""All graphs of a bundle, family by family. A new family is a file of this folder and a line here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from . import adamw, block, block_decode, core, embedding, head, lora
from .golden_case import GraphWithCases, Materials


class Family(Protocol):
    """What a file of a family of graphs offers.

    Attributes:
        KINDS: the kinds of its graphs, as ``graphs`` of a manifest names them.
    """

    @property
    def KINDS(self) -> tuple[str, ...]: ...

    def make(self, materials: Materials, /) -> Iterator[GraphWithCases]:
        """Its graphs of one base model, each with its tests."""
        ...


FAMILIES: Final[tuple[Family, ...]] = (lora, core, adamw, embedding, head, block, block_decode)
KINDS: Final = tuple(kind for family in FAMILIES for kind in family.KINDS)


def make_graphs(materials: Materials) -> Iterator[GraphWithCases]:
    """Every graph of a bundle with its tests, in the order of the manifest."""
    for family in FAMILIES:
        yield from family.make(materials)
