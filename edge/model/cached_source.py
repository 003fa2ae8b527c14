"""Where the hidden states that come out of the server's blocks are had from: the cache, or the server itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from dlora.edge.data.batches import MicroBatch, pack
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.protocol.choices import Send
from dlora.protocol.tensors import FloatArray, WireTensor
from dlora.protocol.traffic import text_bytes
from dlora.protocol.wire_codecs import Codecs, decode_floats

from .encoding_server import EncodingServer
from .ends import LongArray
from .kept_outputs_cache import KeptOutputsCache, kept_outputs_path
from .text_packs import TextPacks
from .trunk_cache import TrunkCache

_PACKS_AHEAD: Final = 32  # that are asked for at once while a cache is filled


class CachedSource:
    """What comes out of a server's blocks, as ``EncodingServer`` has it, with what is kept of it.

    The server runs texts in packs (``TextPacks``). It is connected to when a text is missing, and only then.

    Args:
        server: closed with this, as the cache is.
        codecs, send: with which it is asked.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        cache: TrunkCache,
        server: EncodingServer,
        *,
        codecs: Codecs,
        send: Send = "embeddings",
    ) -> None:
        self.cache = cache
        self.crossed = server
        self.kept = KeptOutputsCache(
            kept_outputs_path(cache.path), cache.owner, bundle, engine, room=lambda: cache.room, key=cache.key
        )
        self._embedding_size = bundle.manifest.base_model.embedding_size
        self._codecs = codecs
        self._send = send
        self._packs = TextPacks((), cache.digest)
        self._kept_packs = 0  # of these, the first so many have room in the cache

    @property
    def kept_bytes(self) -> int:
        """What asking for all that is kept puts on the wire, about: also where it came in an earlier process."""
        crossed = text_bytes(self.cache.tokens, self._embedding_size, self._codecs, self._send)
        return crossed + self.cache.nbytes

    def fill(self, texts: Iterable[LongArray], progress: Callable[[int], None] = lambda _: None) -> bool:
        """Ask for what the cache does not have, in the order of ``texts``, as long as there is room; then hang up.

        Returns whether there was room for all. ``progress`` is called with how many more texts are dealt with. Raises
        as ``hidden_states``, and whatever ``progress`` does: what has come stays.
        """
        self._packs = packs = TextPacks(texts, self.cache.digest)
        progress(packs.texts - packs.different)
        sizes = (sum(map(self.cache.record_bytes, packs.lengths(index))) for index in range(len(packs)))
        self._kept_packs = sum(end <= self.cache.room_for_records for end in itertools.accumulate(sizes))
        for start in range(0, self._kept_packs, _PACKS_AHEAD):
            some = [packs[index] for index in range(start, min(start + _PACKS_AHEAD, self._kept_packs))]
            missing = [pack for pack in some if not all(digest in self.cache for digest in pack)]
            progress(sum(map(len, some)) - sum(map(len, missing)))
            for count in self._ask_and_keep(missing):
                progress(count)
        self.crossed.close()
        is_kept = all(digest in self.cache for index in range(self._kept_packs) for digest in packs[index])
        return is_kept and self._kept_packs == len(packs)

    def hidden_states(self, batch: MicroBatch) -> FloatArray:
        """Of all texts of a micro-batch, float32 (tokens, width).

        Raises what ``Connection`` raises, ``DataError`` for a text that is longer than the server takes, and
        ``StorageError``.
        """
        texts = batch.texts()
        digests = [self.cache.digest(ids) for ids in texts]
        found = {digest: self.cache.get(digest, len(ids)) for digest, ids in zip(digests, texts, strict=True)}
        missing = {digest: ids for digest, ids in zip(digests, texts, strict=True) if found[digest] is None}
        for _ in self._ask_and_keep(self._packs_with(missing), found):
            pass
        tensors = [found[digest] for digest in digests]
        return np.concatenate([decode_floats(tensor) for tensor in tensors if tensor is not None])

    def _packs_with(self, texts: dict[bytes, LongArray]) -> list[dict[bytes, LongArray]]:
        """The packs that they are in; one that is in none that is kept comes alone."""
        indices = {digest: self._packs.index_of(digest) for digest in texts}
        whole = {index: None for index in indices.values() if index is not None and index < self._kept_packs}
        alone = [{digest: texts[digest]} for digest, index in indices.items() if index not in whole]
        return [*(self._packs[index] for index in whole), *alone]

    def _ask_and_keep(
        self, packs: Sequence[dict[bytes, LongArray]], found: dict[bytes, WireTensor | None] | None = None
    ) -> Iterator[int]:
        """Ask for all texts of ``packs``; gives the number of each pack's once they are kept, where there is room.

        ``found``: which to add them to.
        """
        if not packs:
            return
        answers = self.crossed.encode([list(texts.values()) for texts in packs])
        for texts, tensors in zip(packs, answers, strict=True):
            for digest, tensor in zip(texts, tensors, strict=True):
                self.cache.add(digest, tensor)
                if found is not None and found.get(digest) is None:
                    found[digest] = tensor
            yield len(texts)

    def close(self) -> None:
        """Hang up and close the caches."""
        self.crossed.close()
        self.kept.close()
        self.cache.close()


def texts_of(dataset: Dataset, indices: Iterable[int] | None = None) -> Iterator[LongArray]:
    """What of each example goes through the server's blocks, int64 (tokens,): as far as its last label needs it."""
    for index in range(len(dataset)) if indices is None else indices:
        yield pack([dataset[index]]).until_last_label().ids
