"""What comes out of the lowest blocks on the device while none of them is trained: computed once for each text, kept.

A killed unit keeps its effect here, and its adapters do not change: until a unit among these blocks is revived, what
comes out of them is a function of the text. It is kept on the disk, and these blocks are skipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from dlora.edge.data.batches import MicroBatch
from dlora.edge.data.examples import Dataset
from dlora.protocol.tensors import FloatArray

from .blocks import DeviceBlocks
from .cached_source import texts_of
from .encoder import batch_of
from .ends import LongArray
from .kept_outputs_cache import KeptOutputsCache
from .source import HiddenStateSource
from .text_packs import TextPacks
from .trunk_cache import TrunkCache

_LEAST_EPOCHS: Final = 2  # that what is kept must last for: the first only fills it


@dataclass
class KeptOutputs:
    """Hidden states after the lowest blocks of a device, as they are while these are not trained.

    Texts are computed in packs (``TextPacks``), so that a text has the same bits whether it was kept, or is computed
    again after a kill.

    Attributes:
        source: of what goes into the lowest block.
        kept: where what comes out of the lowest blocks is kept.
        dataset: what is trained on, no other text is asked for.
        examples_a_step: how many of them a step takes.
        most_tokens: of a pack.
        unchanged_steps: the steps around one in which the units' states stay as they are.
    """

    blocks: DeviceBlocks
    source: HiddenStateSource
    kept: KeptOutputsCache
    dataset: Dataset
    examples_a_step: int
    most_tokens: int
    unchanged_steps: Callable[[int], range]
    _packs: TextPacks | None = field(init=False, default=None)
    _kept_for: tuple[int, int] | None = field(init=False, default=None)  # how many blocks, and from which step on
    _cache: TrunkCache | None = field(init=False, default=None)

    def count(self, step: int, trained: Collection[str]) -> int:
        """How many of the lowest blocks are skipped in this step: those below all that is ``trained``, where that will
        stay so for long enough."""
        steps = len(self.unchanged_steps(step))
        if steps * self.examples_a_step < _LEAST_EPOCHS * len(self.dataset):
            return 0
        return self.blocks.count_below(trained)

    def hidden_states(
        self, batch: MicroBatch, step: int, count: int, lora: Mapping[str, FloatArray], scaling: float
    ) -> FloatArray:
        """After the lowest ``count`` blocks, float32 (tokens, width), of all texts of a micro-batch.

        Raises what the source raises, and ``StorageError``.
        """
        packs, cache = self._keep_for(step, count, lora, scaling)
        texts = batch.texts()
        digests = [self.kept.digest(ids) for ids in texts]

        def compute(pack: dict[bytes, LongArray]) -> Iterable[FloatArray]:
            whole = batch_of(list(pack.values()))
            lengths = whole.sequence_lengths
            out = self.blocks.forward_lowest(self.source.hidden_states(whole), lengths, lora, scaling, count)
            return np.split(out, np.cumsum(lengths)[:-1])

        wanted = {digest: len(ids) for digest, ids in zip(digests, texts, strict=True)}
        found = packs.kept_or_computed(wanted, cache, "fp32", compute)
        return np.concatenate([found[digest] for digest in digests])

    def _keep_for(
        self, step: int, count: int, lora: Mapping[str, FloatArray], scaling: float
    ) -> tuple[TextPacks, TrunkCache]:
        """All texts, and a cache of what comes out of these blocks, with their adapters as they are."""
        wanted = count, self.unchanged_steps(step).start
        if self._packs is None:
            self._packs = TextPacks(texts_of(self.dataset), self.kept.digest, self.most_tokens)
        if self._cache is None or self._kept_for != wanted:
            names = sorted(self.blocks.parameters_below(count) & lora.keys())
            digest = hashlib.sha256(repr((scaling, self.most_tokens, names)).encode())
            for name in names:
                digest.update(np.ascontiguousarray(lora[name]).tobytes())
            self._cache = self.kept.after(count, digest.hexdigest())
            self._kept_for = wanted
        return self._packs, self._cache
