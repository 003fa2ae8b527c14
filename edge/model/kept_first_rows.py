"""Keys and values of the rows before answers, in the blocks on the device: computed once for each text, kept.

No adapter reaches these rows, so nothing that a run learns changes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from dlora.edge.data.batches import MicroBatch
from dlora.edge.data.examples import Dataset, last_occurrence
from dlora.protocol.errors import BundleError
from dlora.protocol.tensors import FloatArray

from .answer_blocks import AnswerBlocks, FirstRows
from .attention_masks import Rows
from .cached_source import texts_of
from .encoder import batch_of
from .ends import LongArray
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
        digests = [self.kept.digest(ids) for ids in batch.texts()]
        firsts = [len(ids) - acting for ids, acting in zip(batch.texts(), batch.rows_of_texts(), strict=True)]
        wanted = dict(zip(digests, firsts, strict=True))
        found = packs.kept_or_computed(wanted, cache, KEYS_CODEC, self._compute)
        rows = [found[digest] for digest in digests if wanted[digest]]
        return self._by_block(np.concatenate([np.zeros((0, self.blocks.keys_width), np.float32), *rows]))

    def _compute(self, pack: dict[bytes, LongArray]) -> Iterable[FloatArray]:
        """Keys and values of the first rows of each text of a pack, (first, width) as they are kept."""
        whole, invocation = batch_of(list(pack.values())), self.dataset.invocation
        firsts = np.array([last_occurrence(ids.astype(np.int32), invocation) for ids in pack.values()])
        rows = Rows.of(whole.sequence_lengths)
        is_first = rows.places < firsts[rows.texts]
        first = self.blocks.run_first(self.source.hidden_states(whole)[is_first], rows.only(is_first))
        flat = np.concatenate([part.reshape(len(part), -1) for of_block in first.keys for part in of_block], 1)
        if not np.isfinite(flat).all():  # no adapter has a part in it
            raise BundleError(
                "NaN or infinity in keys and values of the bundle's blocks; dlora-edge selftest tells what is wrong"
            )
        return np.split(flat, np.cumsum(firsts)[:-1])

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
            of = f"{self.most_tokens} {self.dataset.invocation} {self.dataset.fingerprint}"
            self._open = packs, self.kept.of_keys(self.blocks.count, self.blocks.keys_width, of)
        return self._open
