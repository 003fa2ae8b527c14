"""Using an adapter without training it: an open model, to evaluate or to generate with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlora.edge.adapters.compatibility import check_adapter, check_base_model, load_weights, with_saved_gains
from dlora.edge.adapters.peft import load_adapter
from dlora.edge.adapters.units import AdapterSet
from dlora.edge.choices import EngineChoice
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine
from dlora.edge.memory import release_freed_memory
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.connection import Connection
from dlora.protocol import interrupts
from dlora.protocol import messages as m
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.choices import Send
from dlora.protocol.errors import NonFiniteError
from dlora.protocol.groups import without_gains
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import groups_of
from dlora.protocol.wire_codecs import Codecs

from .session import UntrainedSession
from .split import SplitModel


class UseSession(UntrainedSession):
    """A session that trains nothing: its groups are those that have an adapter, and all of them are live.

    Args:
        context_length: for how many tokens of a context the server is to keep keys and values, or fewer where it
            has no room for as many.
    """

    def __init__(
        self,
        connection: Connection,
        adapters: AdapterSet,
        codecs: Codecs,
        *,
        base_fingerprint: str,
        context_length: int = 0,
    ) -> None:
        super().__init__(connection, adapters)
        self._context_length = context_length
        self._codecs = codecs
        self._base_fingerprint = base_fingerprint

    def opening_message(self) -> m.OpenSession:
        return m.OpenSession(
            base_fingerprint=self._base_fingerprint,
            groups=self.adapters.group_specs,
            adapter=self.adapters.adapter_spec,
            codecs=self._codecs,
            evaluation_codecs=self._codecs,
            purpose=m.Use(context_length=min(self._context_length, self.connection.welcome.max_context_length)),
        )


@contextmanager
def open_model(
    bundle: Bundle,
    server: str,
    adapter: Path | None,
    *,
    wire_dtype: str,
    context_length: int = 0,
    send: Send = "embeddings",
    threads: int = 0,
    engine: EngineChoice = "auto",
    connecting: ConnectSettings | None = None,
) -> Iterator[SplitModel]:
    """A split model with a saved adapter, or none; blocks without an adapter do not exchange.

    ``context_length``: as ``UseSession`` takes it.
    """
    manifest = bundle.manifest
    adapters, invocation = load_adapters(manifest, adapter)
    release_freed_memory()  # its files were read whole
    loaded_engine, codecs = make_engine(bundle, engine, threads), Codecs.parse(wire_dtype)
    with interrupts.raise_on_signal(), _name_adapter_in_error(), Connection(server, connecting) as connection:
        check_base_model(bundle, connection.welcome)
        session = UseSession(
            connection,
            adapters,
            codecs,
            base_fingerprint=manifest.base_model.fingerprint,
            context_length=context_length,
        )
        session.open()
        if connection.recorder is not None:
            connection.recorder.add_parameters(adapters.for_recording())
        yield SplitModel(bundle, loaded_engine, session, invocation=invocation, send=send)


def load_adapters(manifest: Manifest, adapter: Path | None) -> tuple[AdapterSet, tuple[int, ...]]:
    """The adapters of a directory, or none, and the tokens from which on they act. Keeps nothing else of what it read.

    Raises ``CheckpointError`` and ``ModelMismatchError``.
    """
    loaded = load_adapter(adapter) if adapter else None
    if loaded is not None:
        check_adapter(manifest, loaded)
    groups = without_gains(groups_of(manifest, loaded.modules)) if loaded else ()
    if loaded and loaded.parts:
        spec, scaling = AdapterSpec(loaded.parts.kind, loaded.parts.r), loaded.parts.scaling
        groups = with_saved_gains(groups, spec.kind, loaded)
    else:
        rank = next(iter(loaded.modules.values())).lora_A.shape[0] if loaded else manifest.defaults.r
        spec, scaling = AdapterSpec(r=rank), manifest.defaults.lora_alpha / rank
    adapters = AdapterSet.create(spec, groups, scaling=scaling, seed=(0,), unit="group", kill_every=1)
    if loaded is None:
        return adapters, ()
    load_weights(adapters, loaded, loaded.invocation)
    return adapters, loaded.invocation


@contextmanager
def _name_adapter_in_error() -> Iterator[None]:
    try:
        yield
    except NonFiniteError as error:
        text = f"{error}: the adapter is of a run that diverged; train it anew with a lower --lr"
        raise NonFiniteError(text) from None
