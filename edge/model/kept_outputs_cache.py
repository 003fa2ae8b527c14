"""Where what a run computes of its blocks again and again alike is kept: what comes out of the lowest ones while none
of them is trained, or keys and values of the rows before answers. One file, made anew when that is of other blocks, or
of other adapters in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.protocol.choices import DifferenceDtype

from .cache_key import CacheKey
from .ends import LongArray
from .trunk_cache import CacheOwner, TrunkCache, open_or_renew, text_digest

KEYS_CODEC: Final[DifferenceDtype] = "fp16"
"""How keys and values are kept."""


class KeptOutputsCache:
    """A cache of what blocks that run here give.

    Args:
        path: of the file.
        owner: of the hidden states that go into the lowest block.
        bundle, engine: what these blocks are computed with.
        room: called for the bytes that the file may have.
        key: what it is encrypted with.
    """

    def __init__(
        self,
        path: Path,
        owner: CacheOwner,
        bundle: Bundle,
        engine: Engine,
        *,
        room: Callable[[], int],
        key: CacheKey | None = None,
    ) -> None:
        spec = bundle.manifest.device_blocks
        self._path = path
        self._owner = owner
        self._computed_by = f"{spec.dtype if spec is not None else ''} {engine.name}"
        self._room = room
        self._key = key
        self._open: TrunkCache | None = None

    def digest(self, ids: LongArray) -> bytes:
        """What the text of these tokens, int64 (tokens,), is called here."""
        return text_digest(ids, self._key)

    def after(self, count: int, lora: str) -> TrunkCache:
        """A cache of what comes out of the lowest ``count`` blocks with adapters of this digest; any other is closed.

        Closed with this. Raises ``StorageError``, and ``CheckpointError`` where the file has another key.
        """
        return self._opened(
            msgspec.structs.replace(
                self._owner, blocks=self._owner.blocks + count, codec="fp32", lora=f"{lora} {self._computed_by}"
            )
        )

    def of_keys(self, count: int, width: int, packs: str) -> TrunkCache:
        """Likewise, of keys and values (tokens, width) in ``count`` blocks; ``packs`` says how texts were packed."""
        lora = f"keys and values of {count} blocks, {packs}: {self._computed_by}"
        return self._opened(msgspec.structs.replace(self._owner, width=width, codec=KEYS_CODEC, lora=lora))

    def _opened(self, owner: CacheOwner) -> TrunkCache:
        self.close()
        self._open = open_or_renew(self._path, owner, limit=self._room(), key=self._key)
        return self._open

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            self._open.close()
            self._open = None


def kept_outputs_path(cache: Path) -> Path:
    """Where what comes out of killed blocks is kept, beside what the server gave."""
    return cache.with_stem(f"{cache.stem}-kept")
