"""What groups read in the base pass, on the device's disk: from the second epoch on a step does not wait for it.

No adapter changes the base pass: what it gives at a text's rows depends on the text, up to how sums over several texts
are rounded. The server makes it again in each step, for the differences of later passes are taken from it, and asks as
ever where it does not come to the same bits. So what a run learns does not depend on what was kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from dlora.edge.data.batches import MicroBatch
from dlora.edge.files import remove_quietly
from dlora.protocol.adapters import AdapterSpec, Crossing, crossings
from dlora.protocol.choices import Send
from dlora.protocol.groups import GroupSpec, without_gains
from dlora.protocol.manifest import Manifest
from dlora.protocol.passes import may_send_early, pieces
from dlora.protocol.tensors import SCALE_BYTES, WireTensor, stored_width
from dlora.protocol.wire_codecs import Codecs, is_finite

from .cache_key import CacheKey
from .ends import LongArray
from .trunk_cache import CacheOwner, TrunkCache, open_or_renew

Stored = npt.NDArray[Any]
"""What a group has read, as it is stored: (rows, columns)."""
Early = Sequence[tuple[tuple[int, ...], WireTensor]]
"""What groups read, in the pieces in which they answer."""

_MOST_REFUSALS: Final = 8
"""More of late than uses, and the server reads something else too often for this to be worth its bytes."""


class KeptReads:
    """What all groups of a run have read of each text. Its rows are those of all groups, side by side.

    Args:
        cache: of rows of ``reads_width``, as they cross: in ``int8`` or ``fp32``, which store each row by itself.
        crossings: of each group.
    """

    def __init__(self, cache: TrunkCache, crossings: Sequence[Crossing]) -> None:
        self._refusals = 0  # one less with each use
        self._replaced = 0  # texts, in the file
        self._cache = cache
        self._crossings = crossings
        self._dtype = cache.owner.codec
        self._ends = np.cumsum([stored_width(self._dtype, each.input_width) for each in crossings])

    def find(self, batch: MicroBatch) -> Early:
        """What the groups will read of a micro-batch; nothing where it is not kept of all texts, where it would take
        more messages than the server takes in while it computes, and where that reads something else too often.

        Raises ``StorageError``.
        """
        counts = batch.rows_of_texts()
        if not may_send_early(self._crossings, sum(counts)) or self._is_refused_too_often:
            return []
        found: list[Stored] = []
        for ids, rows in zip(batch.texts(), counts, strict=True):
            if rows:
                kept = self._cache.get(self._name(ids, rows), rows)
                if kept is None:
                    return []
                found.append(kept.data)
        if not found:
            return []
        of_group = np.split(np.concatenate(found), self._ends[:-1], axis=1)
        early = [
            (piece, WireTensor(self._dtype, np.concatenate([of_group[group] for group in piece])))
            for piece in pieces(range(len(of_group)), self._crossings, sum(counts))
        ]
        return early if all(is_finite(tensor) for _, tensor in early) else []

    def keep(self, batch: MicroBatch, read: Mapping[int, Stored]) -> None:
        """Keep what each group has read of a micro-batch, in place of what is kept that differs; of twice as many
        texts as there are at most, for the file grows with each.

        Raises ``StorageError``.
        """
        if self._is_refused_too_often:
            return
        whole = np.concatenate([read[group] for group in range(len(self._crossings))], axis=1)
        parts = np.split(whole, np.cumsum(batch.rows_of_texts())[:-1])
        for ids, stored in zip(batch.texts(), parts, strict=True):
            name = self._name(ids, len(stored))
            if not len(stored):
                continue
            kept = self._cache.get(name, len(stored)) if name in self._cache else None
            if kept is not None and kept.data.tobytes() != stored.tobytes() and self._replaced < 2 * len(self._cache):
                self._cache.forget(name)
                self._replaced += 1
            self._cache.add(name, WireTensor(self._dtype, stored))

    def count(self, *, is_refused: bool) -> None:
        """The server has read the same as what was found, or not."""
        self._refusals = max(0, self._refusals + (1 if is_refused else -1))

    def close(self) -> None:
        """Close the cache, and remove it where nothing is kept."""
        is_empty = not len(self._cache)
        self._cache.close()
        if is_empty:
            remove_quietly(self._cache.path)

    @property
    def _is_refused_too_often(self) -> bool:
        return self._refusals > _MOST_REFUSALS

    def _name(self, ids: LongArray, rows: int) -> bytes:
        """What a text is called of which so many rows cross: its tokens alone do not say how many."""
        return self._cache.digest(np.append(ids, -rows))


def open_kept_reads(
    path: Path,
    manifest: Manifest,
    spec: AdapterSpec,
    groups: Sequence[GroupSpec],
    codecs: Codecs,
    send: Send,
    *,
    limit: int,
    key: CacheKey | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> KeptReads:
    """What a run with these adapters keeps in this file, as ``TrunkCache`` has it; another one's goes.

    Raises ``OtherKeyError`` and ``StorageError``.
    """
    each = crossings(spec, groups)
    owner = msgspec.structs.replace(
        CacheOwner.of(manifest, 0, reads_width(codecs.group_input, each), codecs, send),
        codec=codecs.group_input,
        lora=hashlib.sha256(msgspec.json.encode((spec, without_gains(groups)))).hexdigest(),
    )
    return KeptReads(open_or_renew(path, owner, limit=limit, key=key, warn=warn), each)


def reads_width(dtype: str, crossings: Sequence[Crossing]) -> int:
    """Of a row of what is kept, as a tensor of this ``dtype`` has it."""
    columns = sum(stored_width(dtype, each.input_width) for each in crossings)
    return columns - SCALE_BYTES if dtype == "int8" else columns  # the last group's scale is that of the whole row
