"""What a server needs to go on from tokens that it has seen: the base model with a cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dlora.protocol.errors import ExportError

from .cache import PartCache
from .parts import ModelParts


@dataclass(frozen=True)
class Decoding:
    """A base model that goes on from what it has seen.

    Attributes:
        max_context_length: the most tokens of a context, in all blocks.
    """

    parts: ModelParts
    max_context_length: int

    @classmethod
    def of(cls, parts: ModelParts, most_bytes: int | None = None, computing_bytes: int = 0) -> Decoding | None:
        """None where its family keeps its past in another way than as keys and values.

        Args:
            most_bytes: of one context, with what computing takes for each of its tokens, ``computing_bytes``; None: no
                limit.
        """
        try:
            bytes_per_token = parts.cache_bytes_per_token()
        except ExportError:
            return None
        longest = parts.base.max_sequence_length
        if most_bytes is not None:
            longest = min(longest, most_bytes // (bytes_per_token + computing_bytes))
        return cls(parts, longest)

    def bytes_per_token(self, blocks: int | None = None) -> int:
        """Of keys and values, in the first ``blocks`` blocks; None: in all."""
        return self.parts.cache_bytes_per_token(blocks)

    def new_cache(self, context_length: int, blocks: int | None = None) -> PartCache:
        """An empty cache of the same blocks, with room for so many tokens."""
        return self.parts.new_cache(end=blocks, room=context_length)

    def append(self, inputs_embeds: Tensor, cache: PartCache, position: int) -> Tensor:
        """Go on with ``inputs_embeds`` (1, length, embedding_size) after the first ``position`` tokens of the cache; it
        then holds these and no others. No gradients.

        Returns the last hidden states (1, length, hidden_size), or those after the last of the cache's blocks (1,
        length, width).
        """
        cache.crop(position)
        return self.parts.run(inputs_embeds, end=cache.end, cache=cache)
