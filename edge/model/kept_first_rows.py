"""Keys and values of the rows before answers, in the blocks on the device: computed once for each text, kept.

No adapter reaches these rows, so nothing that a run learns changes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from dlora.edge.data.batches import MicroBatch
from dlora.edge.data.examples import Dataset, last_occurrence
from dlora.protocol.errors import BundleError, NonFiniteError
from dlora.protocol.tensors import FloatArray, WireTensor
from dlora.protocol.wire_codecs import decode_floats, encode_floats

from .answer_blocks import AnswerBlocks, FirstRows, acting_rows
from .attention_masks import Rows
from .cached_source import texts_of
from .encoder import batch_of
from .kept_outputs_cache import KEYS_CODEC, KeptOutputsCache
from .source import HiddenStateSource
from .text_packs import TextPacks
from .trunk_cache import TrunkCache


@dataclass
class KeptFirstRows:
    """Keys and values of first rows, on the disk.

    Texts are computed in packs (``TextPacks``), and what was computed is rounded as what is kept, so that a text has
    the same bits whether it was kept, or is computed again after a kill.

    Attributes:
        source: of what goes into the lowest block.
        kept: where they are kept.
        dataset: what is trained on, no other text is asked for; every example of it has its invocation.
        most_tokens: of a pack.
    """

    blocks: AnswerBlocks
    source: HiddenStateSource
    kept: KeptOutputsCache
    dataset: Dataset
    most_tokens: int
    _open: tuple[TextPacks, TrunkCache] | None = field(init=False, default=None)

    def of(self, batch: MicroBatch) -> FirstRows:
        """Those of a micro-batch. Raises what the source raises, and ``StorageError``."""
        packs, cache = self._opened()
        texts, found = batch.texts(), dict[bytes, FloatArray]()
        digests = [self.kept.digest(ids) for ids in texts]
        firsts = [int(part.sum()) for part in np.split(~acting_rows(batch), np.cumsum(batch.sequence_lengths)[:-1])]
        for digest, first in zip(digests, firsts, strict=True):
            if not first or digest in found:
                continue
            tensor = cache.get(digest, first)
            if tensor is None:
                found |= self._compute(packs, cache, digest, digests)
            else:
                found[digest] = decode_floats(tensor)
        width = sum(map(math.prod, self.blocks.key_shapes))
        rows = [found[digest] for digest, first in zip(digests, firsts, strict=True) if first]
        return self._by_block(np.concatenate([np.zeros((0, width), np.float32), *rows]))

    def _compute(
        self, packs: TextPacks, cache: TrunkCache, digest: bytes, wanted: list[bytes]
    ) -> dict[bytes, FloatArray]:
        """What there is of the first rows of the texts of a pack, kept; given are those that are ``wanted``."""
        index = packs.index_of(digest)
        assert index is not None  # all texts of the data are in one
        pack = packs[index]
        whole = batch_of(list(pack.values()))
        invocation = self.dataset.invocation
        firsts = np.array([last_occurrence(ids.astype(np.int32), invocation) for ids in pack.values()])
        rows = Rows.of(whole.sequence_lengths)
        is_first = rows.places < firsts[rows.texts]
        first = self.blocks.run_first(self.source.hidden_states(whole)[is_first], rows.only(is_first))
        flat = [part.reshape(len(part), -1) for of_block in first.keys for part in of_block]
        found = {}
        for name, part in zip(pack, np.split(np.concatenate(flat, 1), np.cumsum(firsts)[:-1]), strict=True):
            if len(part):
                tensor = self._encoded(part)
                cache.add(name, tensor)
                if name in wanted:
                    found[name] = decode_floats(tensor)
        return found

    @staticmethod
    def _encoded(part: FloatArray) -> WireTensor:
        try:
            return encode_floats(part, KEYS_CODEC)
        except NonFiniteError:  # no adapter has a part in it
            raise BundleError(
                "NaN or infinity in keys and values of the bundle's blocks; dlora-edge selftest tells what is wrong"
            ) from None

    def _by_block(self, flat: FloatArray) -> FirstRows:
        """Rows (first, width) as they are kept, block by block."""
        shapes = self.blocks.key_shapes
        ends = np.cumsum([0, *map(math.prod, shapes)])
        parts = [
            flat[:, start:end].reshape(len(flat), *shape)
            for (start, end), shape in zip(pairwise(ends), shapes, strict=True)
        ]
        return FirstRows(list(zip(parts[::2], parts[1::2], strict=True)))

    def _opened(self) -> tuple[TextPacks, TrunkCache]:
        if self._open is None:
            packs = TextPacks(texts_of(self.dataset), self.kept.digest, self.most_tokens)
            width = sum(map(math.prod, self.blocks.key_shapes))
            self._open = (
                packs,
                self.kept.of_keys(
                    self.blocks.count, width, f"{self.most_tokens} {self.dataset.invocation} {self.dataset.fingerprint}"
                ),
            )
        return self._open
