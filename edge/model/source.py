"""Where hidden states come from that go into the first block on the device: a server, a cache, or the embeddings."""

from __future__ import annotations

from .cached_source import CachedSource
from .embedding_source import EmbeddingSource
from .encoding_server import EncodingServer

HiddenStateSource = CachedSource | EncodingServer | EmbeddingSource
"""Hidden states of whole texts."""
TokenSource = EncodingServer | EmbeddingSource
"""Hidden states of the tokens of one text that grows."""
