"""What comes out of the lowest blocks on the device while none of them is trained: computed once for each text, kept.

A killed unit keeps its effect here, and its adapters do not change: until a unit among these blocks is revived, what
comes out of them is a function of the text. It is kept on the disk, and these blocks are skipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Final

import numpy as np

from dlora.edge.data.batches import MicroBatch
from dlora.edge.data.examples import Dataset
from dlora.protocol.tensors import FloatArray
from dlora.protocol.wire_codecs import decode_floats, encode_floats

from .blocks import DeviceBlocks
from .cached_source import texts_of
from .encoder import batch_of
from .kept_outputs_cache import KeptOutputsCache
from .source import HiddenStateSource
from .text_packs import TextPacks
from .trunk_cache import TrunkCache

_LEAST_EPOCHS: Final = 2  # that what is kept must last for: the first only fills it


class KeptOutputs:
    """Hidden states after the lowest blocks of a device, as they are while these are not trained.

    Texts are computed in packs (``TextPacks``), so that a text has the same bits whether it was kept, or is computed
    again after a kill.

    Args:
        source: of what goes into the lowest block.
        kept: where what comes out of the lowest blocks is kept.
        dataset: what is trained on, no other text is asked for.
        examples_a_step: how many of them a step takes.
        most_tokens: of a pack.
        unchanged_steps: the steps around one in which the units' states stay as they are.
    """

    def __init__(
        self,
        blocks: DeviceBlocks,
        source: HiddenStateSource,
        kept: KeptOutputsCache,
        dataset: Dataset,
        *,
        examples_a_step: int,
        most_tokens: int,
        unchanged_steps: Callable[[int], range],
    ) -> None:
        self._blocks = blocks
        self._source = source
        self._kept = kept
        self._dataset = dataset
        self._examples_a_step = examples_a_step
        self._most_tokens = most_tokens
        self._unchanged_steps = unchanged_steps
        self._packs: TextPacks | None = None
        self._kept_for: tuple[int, int] | None = None  # how many blocks, and from which step on
        self._cache: TrunkCache | None = None

    def count(self, step: int, trained: Collection[str]) -> int:
        """How many of the lowest blocks are skipped in this step: those below all that is ``trained``, where that will
        stay so for long enough."""
        steps = len(self._unchanged_steps(step))
        if steps * self._examples_a_step < _LEAST_EPOCHS * len(self._dataset):
            return 0
        return self._blocks.count_below(trained)

    def hidden_states(
        self, batch: MicroBatch, step: int, count: int, lora: Mapping[str, FloatArray], scaling: float
    ) -> FloatArray:
        """After the lowest ``count`` blocks, float32 (tokens, width), of all texts of a micro-batch.

        Raises what the source raises, and ``StorageError``.
        """
        self._keep_for(step, count, lora, scaling)
        texts = batch.texts()
        found: dict[bytes, FloatArray] = {}
        digests = [self._kept.digest(ids) for ids in texts]
        for digest, ids in zip(digests, texts, strict=True):
            if digest not in found:
                kept = self._find(digest, len(ids))
                whole = self._compute(digest, count, lora, scaling) if kept is None else {digest: kept}
                found |= {name: whole[name].copy() for name in whole.keys() & set(digests)}
        return np.concatenate([found[digest] for digest in digests])

    def _find(self, digest: bytes, tokens: int) -> FloatArray | None:
        assert self._cache is not None
        tensor = self._cache.get(digest, tokens)
        return None if tensor is None else decode_floats(tensor)

    def _compute(
        self, digest: bytes, count: int, lora: Mapping[str, FloatArray], scaling: float
    ) -> dict[bytes, FloatArray]:
        """Of all texts of the pack that this one is in."""
        assert self._cache is not None
        assert self._packs is not None
        index = self._packs.index_of(digest)
        assert index is not None  # all texts of the data are in one
        pack = self._packs[index]
        batch = batch_of(list(pack.values()))
        lengths = batch.sequence_lengths
        out = self._blocks.forward_lowest(self._source.hidden_states(batch), lengths, lora, scaling, count)
        found = dict(zip(pack, np.split(out, np.cumsum(lengths)[:-1]), strict=True))
        for name, hidden_states in found.items():
            self._cache.add(name, encode_floats(hidden_states, "fp32"))
        return found

    def _keep_for(self, step: int, count: int, lora: Mapping[str, FloatArray], scaling: float) -> None:
        """Have a cache of what comes out of these blocks, with their adapters as they are."""
        wanted = count, self._unchanged_steps(step).start
        if self._kept_for == wanted:
            return
        if self._packs is None:
            self._packs = TextPacks(texts_of(self._dataset), self._kept.digest, self._most_tokens)
        names = sorted(self._blocks.parameters_below(count) & lora.keys())
        digest = hashlib.sha256(repr((scaling, self._most_tokens, names)).encode())
        for name in names:
            digest.update(np.ascontiguousarray(lora[name]).tobytes())
        self._cache = self._kept.after(count, digest.hexdigest())
        self._kept_for = wanted
