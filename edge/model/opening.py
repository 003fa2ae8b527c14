"""Opens a model to use, with a saved adapter or none, wherever its blocks run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dlora.edge.adapters.compatibility import check_base_model
from dlora.edge.choices import EngineChoice
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine
from dlora.edge.engine.engine import Engine
from dlora.edge.memory import release_freed_memory
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.connection import Connection
from dlora.protocol import interrupts
from dlora.protocol import messages as m
from dlora.protocol.choices import Send, TableDtype
from dlora.protocol.errors import BundleError, NonFiniteError, UsageError
from dlora.protocol.manifest import StoredDtype
from dlora.protocol.wire_codecs import Codecs

from .decode_blocks import DecodeBlocks
from .device_generator import DeviceGenerator
from .device_lora import DeviceLora
from .embedding_source import EmbeddingSource
from .encoding_server import EncodingServer
from .generating import GeneratingModel
from .session import UntrainedSession
from .split import SplitModel
from .trunk import TrunkModel
from .use import load_adapters


@dataclass(frozen=True)
class Opening:
    """Which model, and how it is reached.

    Attributes:
        adapter: a directory; None: the base model.
        device_blocks: how many of the last blocks run here; None: as few as hold the adapter, and at least one.
        server: that runs the others; None: there are none.
        wire_dtype: as ``Codecs.parse`` takes it.
        passes: how a server that runs all blocks asks adapters, as ``passes_to_use`` takes it.
        drafts: whether a server is to guess tokens that may come next in an answer.
        lends: whether a server that runs all blocks is given the adapter, to apply it until the session ends.
    """

    bundle: Bundle
    server: str | None
    adapter: Path | None = None
    device_blocks: int | None = 0
    wire_dtype: str = "fp16"
    send: Send = "embeddings"
    threads: int = 0
    engine: EngineChoice = "auto"
    connecting: ConnectSettings | None = None
    passes: str = "live"
    drafts: bool = False
    lends: bool = False

    @property
    def codecs(self) -> Codecs:
        """How tensors cross. Raises ``UsageError``."""
        return Codecs.parse(self.wire_dtype)

    @property
    def table(self) -> TableDtype | None:
        """Of the embedding, where a server is to guess. It has none of integers, and needs none for token ids."""
        dtype: StoredDtype = "fp16" if self.send == "token-ids" else self.bundle.manifest.embedding.dtype
        return dtype if self.drafts and (dtype == "fp32" or dtype == "fp16") else None

    def connect(self) -> Connection:
        """Connect. Raises what ``Connection`` raises, and ``UsageError`` where no server is named."""
        if self.server is None:
            raise UsageError("--server is missing, which runs blocks; --device-blocks all needs none")
        return Connection(self.server, self.connecting)


@contextmanager
def open_to_generate(opening: Opening, *, context_length: int) -> Iterator[GeneratingModel]:
    """A model that goes on from the tokens that it had last.

    Args:
        context_length: the most tokens of a text; fewer where there is no room for as many. 0, without blocks on the
            device: no context is kept, and each token takes the whole text.

    Raises what loading an adapter and connecting raise; with blocks on the device ``UsageError`` for an adapter that
    reaches further down, and for a server that keeps no context, and ``BundleError`` for a bundle without these blocks,
    or whose blocks cannot go on from earlier tokens.
    """
    if opening.device_blocks == 0:
        with _open_split(opening, context_length) as split:
            yield split
        return
    bundle = opening.bundle
    lora = DeviceLora.load(bundle.manifest, opening.adapter)
    engine = make_engine(bundle, opening.engine, opening.threads)
    blocks = DecodeBlocks(bundle, engine, _blocks_here(opening, lora), lora)
    count = bundle.manifest.base_model.blocks - blocks.first
    source = _source(opening, engine, count, min(context_length, blocks.limit))
    with interrupts.raise_on_signal(), closing(source):
        source.begin()
        yield DeviceGenerator(bundle, engine, blocks, source, context_length=context_length, invocation=lora.invocation)


@contextmanager
def open_to_evaluate(opening: Opening, *, longest: int) -> Iterator[SplitModel | TrunkModel]:
    """A model that is given whole texts. With blocks on the device a server is sent these, and nothing of the adapter.

    ``longest``: tokens of the longest text that it will be given.

    Raises as ``open_to_generate``, and with blocks on the device ``DataError`` for texts that are too long.
    """
    bundle = opening.bundle
    if opening.device_blocks == 0:
        with _open_split(opening, 0) as split:
            yield split
        return
    lora = DeviceLora.load(bundle.manifest, opening.adapter)
    count = _blocks_here(opening, lora)
    engine = make_engine(bundle, opening.engine, opening.threads)
    source = _source(opening, engine, count, 0)
    model = TrunkModel(bundle, engine, lora.adapters(bundle.manifest), count, source, lora.invocation)
    model.check_fits(longest)
    with interrupts.raise_on_signal(), closing(source):
        source.begin()
        yield model


@contextmanager
def _open_split(opening: Opening, context_length: int) -> Iterator[SplitModel]:
    """All blocks on the server; those without an adapter do not exchange."""
    bundle = opening.bundle
    used = load_adapters(bundle.manifest, opening.adapter, "live" if opening.lends else opening.passes)
    adapters = used.adapters
    release_freed_memory()  # its files were read whole
    engine, codecs = make_engine(bundle, opening.engine, opening.threads), opening.codecs
    with interrupts.raise_on_signal(), _name_adapter_in_error(), opening.connect() as connection:
        check_base_model(bundle, connection.welcome)
        fingerprint = bundle.manifest.base_model.fingerprint
        drafts = opening.table if context_length else None
        purpose = m.Use(context_length=context_length, passes=used.passes, drafts=drafts, lends=opening.lends)
        session = UntrainedSession(connection, adapters, purpose, codecs, base_fingerprint=fingerprint)
        session.open()
        if connection.recorder is not None:
            connection.recorder.add_parameters(adapters.for_recording())
        yield SplitModel(bundle, engine, session, invocation=used.invocation, send=opening.send, passes=used.passes)


def _source(opening: Opening, engine: Engine, count: int, context_length: int) -> EmbeddingSource | EncodingServer:
    """Of what goes into the first of the ``count`` blocks on the device."""
    blocks = opening.bundle.manifest.base_model.blocks - count
    if not blocks:
        return EmbeddingSource(opening.bundle, engine)
    return EncodingServer(
        opening.bundle, engine, opening.connect, blocks=blocks, codecs=opening.codecs, send=opening.send,
        context_length=context_length, drafts=opening.table if context_length else None,
    )  # fmt: skip


def _blocks_here(opening: Opening, lora: DeviceLora) -> int:
    """How many of the last blocks run here: as many as wanted, or as few as hold all of an adapter. Raises
    ``UsageError`` and ``BundleError``."""
    manifest, wanted = opening.bundle.manifest, opening.device_blocks
    spec, last = manifest.device_blocks, manifest.base_model.blocks
    if wanted == last:
        return last
    lowest = last - 1 if lora.lowest is None else lora.lowest
    if lowest < 1:
        raise UsageError("the adapter reaches down to block 0, which the server runs; use --device-blocks 0")
    has, needed = 0 if spec is None else len(spec.blocks), last - lowest
    if wanted is not None and wanted < needed:
        raise UsageError(f"the adapter reaches down to block {lowest}; use --device-blocks {needed} or more, or 0")
    count = needed if wanted is None else wanted
    if count > has:
        what = "no blocks for a device"
        if lora.lowest is not None:
            what = f"{has} blocks for a device, and the adapter reaches down to block {lowest}"
        raise BundleError(
            f"the bundle has {what}; export it again with --device-blocks {count}, or use --device-blocks 0"
        )
    return count


@contextmanager
def _name_adapter_in_error() -> Iterator[None]:
    try:
        yield
    except NonFiniteError as error:
        text = f"{error}: the adapter is of a run that diverged; train it anew with a lower --lr"
        raise NonFiniteError(text) from None
