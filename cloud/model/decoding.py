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
        bytes_per_token: of keys and values, in all blocks.
        max_context_length: the most tokens of a context.
    """

    parts: ModelParts
    bytes_per_token: int
    max_context_length: int

    @classmethod
    def of(cls, parts: ModelParts, most_bytes: int | None = None, computing_bytes: int = 0) -> Decoding | None:
        """None where its family keeps its past in another way than as keys and values.

        Args:
            most_bytes: of one context, with what computing takes for each of its tokens, ``computing_bytes``; None: no
                limit.
        """
        try:
            bytes_per_token = parts.cache_bytes_per_token
        except ExportError:
            return None
        longest = parts.base.max_sequence_length
        if most_bytes is not None:
            longest = min(longest, most_bytes // (bytes_per_token + computing_bytes))
        return cls(parts, bytes_per_token, longest)

    def new_cache(self, context_length: int) -> PartCache:
        """An empty cache with room for so many tokens."""
        return self.parts.new_cache(room=context_length)

    def append(self, inputs_embeds: Tensor, cache: PartCache, position: int) -> Tensor:
        """The last hidden states (1, length, hidden_size) of ``inputs_embeds`` (1, length, embedding_size), which come
        after the first ``position`` tokens of the cache; it then holds these and no others. No gradients."""
        cache.crop(position)
        return self.parts.run(inputs_embeds, cache=cache)
