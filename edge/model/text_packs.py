"""Texts in packs: which of them are computed together depends on the data alone, and so do the bits of each.

Sums over several texts are taken in another order than those over one. A pack is always computed whole, so that a text
has the same bits whichever step needs it first, and whatever was there before a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import numpy as np

from dlora.protocol.choices import DifferenceDtype
from dlora.protocol.tensors import FloatArray, IntArray
from dlora.protocol.wire_codecs import decode_floats, encode_floats

from .encoder import cut_for_encoding
from .ends import LongArray
from .trunk_cache import TrunkCache

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

    def kept_or_computed(
        self,
        wanted: Mapping[bytes, int],
        cache: TrunkCache,
        codec: DifferenceDtype,
        compute: Callable[[dict[bytes, LongArray]], Iterable[FloatArray]],
    ) -> dict[bytes, FloatArray]:
        """Of each wanted text, by digest, what is kept of it, float32 (rows, width), or computed with its whole pack,
        which is kept then. All are rounded as what is kept.

        Args:
            wanted: by digest how many rows there are of a text; of one without any nothing is given.
            compute: of the texts of a pack, in its order. What it raises goes through.

        Raises ``StorageError``.
        """
        found: dict[bytes, FloatArray] = {}
        for digest, rows in wanted.items():
            if not rows or digest in found:
                continue
            tensor = cache.get(digest, rows)
            if tensor is not None:
                found[digest] = decode_floats(tensor)
                continue
            index = self.index_of(digest)
            assert index is not None  # no other text is asked for
            pack = self[index]
            for name, values in zip(pack, compute(pack), strict=True):
                if len(values):
                    tensor = encode_floats(values, codec)
                    cache.add(name, tensor)
                    if name in wanted:
                        found[name] = decode_floats(tensor).copy()  # the rest need not be held
        return found

    def lengths(self, index: int) -> list[int]:
        """Tokens of each text of a pack."""
        return [len(ids) for ids in self._packs[index].values()]
