"""Texts in packs: which of them are computed together depends on the data alone, and so do the bits of each.

Sums over several texts are taken in another order than those over one. A pack is always computed whole, so that a text
has the same bits whichever step needs it first, and whatever was there before a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import numpy as np

from dlora.protocol.tensors import IntArray

from .encoder import cut_for_encoding
from .ends import LongArray

PACK_TOKENS: Final = 256
"""Of a pack, or more where one text has more. With fewer, weights are read too often; what attention computes between
texts, for nothing, grows with the square."""


class TextPacks:
    """All different texts of a data set, in its order.

    Args:
        texts: int64 (tokens,) each.
        digest: what a text is called.
        most_tokens: of a pack of several.

    Attributes:
        texts: how many there are, equal ones counted as often as they come; different: how many are different.
    """

    def __init__(
        self, texts: Iterable[LongArray], digest: Callable[[LongArray], bytes], most_tokens: int = PACK_TOKENS
    ) -> None:
        kept: dict[bytes, IntArray] = {}
        self.texts = 0
        for ids in texts:
            self.texts += 1
            kept.setdefault(digest(ids), ids.astype(np.int32))
        self.different = len(kept)
        digests, ids_of = list(kept), list(kept.values())
        pieces = list(cut_for_encoding([len(ids) for ids in ids_of], max_tokens=most_tokens))
        self._packs = [{digests[place]: ids_of[place] for place in piece} for piece in pieces]
        self._pack_of = {name: index for index, pack in enumerate(self._packs) for name in pack}

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> dict[bytes, LongArray]:
        """The texts of a pack, int64 (tokens,) each, by digest."""
        return {name: ids.astype(np.int64) for name, ids in self._packs[index].items()}

    def index_of(self, digest: bytes) -> int | None:
        """The pack that a text is in."""
        return self._pack_of.get(digest)

    def lengths(self, index: int) -> list[int]:
        """Tokens of each text of a pack."""
        return [len(ids) for ids in self._packs[index].values()]
