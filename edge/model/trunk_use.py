"""Opens a model to use whose last blocks run here, with an adapter that lies wholly in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlora.edge.adapters.compatibility import check_base_model
from dlora.edge.choices import EngineChoice
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.connection import Connection
from dlora.protocol import interrupts
from dlora.protocol.choices import Send
from dlora.protocol.errors import BundleError, UsageError
from dlora.protocol.manifest import Manifest
from dlora.protocol.wire_codecs import Codecs

from .decode_blocks import DecodeBlocks
from .device_lora import DeviceLora, lora_to_evaluate
from .encoded_source import EncodedSource
from .encoder import Encoder, EncodeSession
from .ends import Embedding
from .trunk import TrunkModel
from .trunk_generator import TrunkGenerator
from .trunk_source import encoded_width


@contextmanager
def open_trunk(
    bundle: Bundle,
    server: str,
    adapter: Path | None,
    *,
    wire_dtype: str,
    context_length: int,
    blocks: int | None = None,
    send: Send = "embeddings",
    threads: int = 0,
    engine: EngineChoice = "auto",
    connecting: ConnectSettings | None = None,
) -> Iterator[TrunkGenerator]:
    """A model whose last blocks run here.

    Args:
        context_length: for how many tokens the server is to keep keys and values of its blocks.
        blocks: how many run here; None: as few as hold the adapter, and one for the plain base model.

    Raises ``UsageError`` for an adapter that reaches further down than the blocks that can run here, and for a server
    that keeps no context, and ``BundleError`` for a bundle without blocks that can go on from earlier tokens.
    """
    manifest = bundle.manifest
    lora = DeviceLora.load(manifest, adapter)
    runs, codecs = make_engine(bundle, engine, threads), Codecs.parse(wire_dtype)
    here = DecodeBlocks(bundle, runs, blocks_needed(manifest, lora.lowest, blocks), lora)
    with interrupts.raise_on_signal(), Connection(server, connecting) as connection:
        check_base_model(bundle, connection.welcome)
        if not connection.welcome.max_context_length:
            raise UsageError(
                "the server keeps no context of this model, which blocks on this device need; use --device-blocks 0"
            )
        session = _session(manifest, connection, codecs, here.first, min(context_length, here.limit))
        yield TrunkGenerator(bundle, runs, session, here, codecs, invocation=lora.invocation, send=send)


@contextmanager
def open_trunk_to_evaluate(
    bundle: Bundle,
    server: str,
    adapter: Path | None,
    *,
    longest: int,
    wire_dtype: str,
    blocks: int | None = None,
    send: Send = "embeddings",
    threads: int = 0,
    engine: EngineChoice = "auto",
    connecting: ConnectSettings | None = None,
) -> Iterator[TrunkModel]:
    """A model to evaluate with, blocks as in ``open_trunk``. The server is sent texts, and nothing of the adapter.

    ``longest``: tokens of the longest text that it will be given.

    Raises what ``open_trunk`` raises for an adapter that cannot be, and ``DataError`` for texts that are too long.
    """
    manifest = bundle.manifest
    lora = lora_to_evaluate(manifest, adapter)
    count = blocks_needed(manifest, lora.lowest, blocks)
    runs, codecs, source = make_engine(bundle, engine, threads), Codecs.parse(wire_dtype), EncodedSource()
    model = TrunkModel(bundle, runs, lora.adapters(manifest), count, source)
    model.check_fits(longest)
    with interrupts.raise_on_signal(), Connection(server, connecting) as connection:
        check_base_model(bundle, connection.welcome)
        session = _session(manifest, connection, codecs, manifest.base_model.blocks - count)
        source.encoder = Encoder(session, Embedding(bundle, runs), codecs, send)
        yield model


def _session(
    manifest: Manifest, connection: Connection, codecs: Codecs, blocks: int, context_length: int = 0
) -> EncodeSession:
    session = EncodeSession(
        connection,
        codecs,
        blocks=blocks,
        width=encoded_width(manifest),
        base_fingerprint=manifest.base_model.fingerprint,
        context_length=context_length,
    )
    session.open()
    return session


def blocks_needed(manifest: Manifest, lowest_with_lora: int | None, wanted: int | None = None) -> int:
    """How many of the last blocks run here: ``wanted``, or as few as hold all of an adapter. Raises ``UsageError`` and
    ``BundleError``."""
    spec, last = manifest.device_blocks, manifest.base_model.blocks
    lowest = last - 1 if lowest_with_lora is None else lowest_with_lora
    if lowest < 1:
        raise UsageError("the adapter reaches down to block 0, which the server runs; use --device-blocks 0")
    has, count = 0 if spec is None else len(spec.blocks), last - lowest
    if wanted is not None and wanted < count:
        raise UsageError(f"the adapter reaches down to block {lowest}; use --device-blocks {count} or more, or 0")
    count = count if wanted is None else wanted
    if count > has:
        what = "no blocks for a device"
        if lowest_with_lora is not None:
            what = f"{has} blocks for a device, and the adapter reaches down to block {lowest}"
        raise BundleError(
            f"the bundle has {what}; export it again with --device-blocks {count}, or use --device-blocks 0"
        )
    return count
