"""Using an adapter without training it: an open model for evaluation, and greedy answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dlora.edge.adapters.compatibility import check_base_model, load_weights
from dlora.edge.adapters.peft import load_adapter
from dlora.edge.adapters.units import AdapterSet
from dlora.edge.choices import EngineChoice
from dlora.edge.data.examples import last_occurrence
from dlora.edge.data.prompt import PromptTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.connection import Connection
from dlora.protocol import interrupts
from dlora.protocol import messages as m
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.choices import Send
from dlora.protocol.errors import DataError, NonFiniteError, RemoteProtocolError
from dlora.protocol.targets import groups_of
from dlora.protocol.wire_codecs import Codecs

from .session import ModelSession
from .split import SplitModel


class UseSession(ModelSession):
    """A session that trains nothing: its groups are those that have an adapter, and all of them are live."""

    def __init__(
        self, connection: Connection, adapters: AdapterSet, codecs: Codecs, *, base_fingerprint: str
    ) -> None:
        super().__init__(connection, adapters)
        self._codecs = codecs
        self._base_fingerprint = base_fingerprint

    def opening_message(self) -> m.OpenSession:
        return m.OpenSession(
            base_fingerprint=self._base_fingerprint,
            groups=self.adapters.group_specs,
            adapter=self.adapters.adapter_spec,
            codecs=self._codecs,
            evaluation_codecs=self._codecs,
            purpose=m.Use(),
        )

    def handle_opened(self, opened: m.SessionOpened) -> None:
        pass

    def run_basis_pass(self) -> int:
        return 0

    def send_unanswered(self) -> None:
        pass

    def handle_signal(self, signal: m.Signal) -> None:
        raise RemoteProtocolError("a signal where nothing is trained")


@contextmanager
def open_model(
    bundle: Bundle,
    server: str,
    adapter: Path | None,
    *,
    wire_dtype: str,
    send: Send = "embeddings",
    threads: int = 0,
    engine: EngineChoice = "auto",
    connecting: ConnectSettings | None = None,
) -> Iterator[SplitModel]:
    """A split model with a saved adapter, or none; blocks without an adapter do not exchange."""
    manifest = bundle.manifest
    loaded = load_adapter(adapter) if adapter else None
    groups = groups_of(manifest, loaded.modules) if loaded else ()
    if loaded and loaded.parts:
        spec, scaling = AdapterSpec(loaded.parts.kind, loaded.parts.r), loaded.parts.scaling
    else:
        rank = next(iter(loaded.modules.values())).lora_A.shape[0] if loaded else manifest.defaults.r
        spec, scaling = AdapterSpec(r=rank), manifest.defaults.lora_alpha / rank
    adapters = AdapterSet.create(spec, groups, scaling=scaling, seed=(0,), unit="group", kill_every=1)
    if loaded is not None:
        load_weights(adapters, loaded, loaded.invocation)
    loaded_engine, codecs = make_engine(bundle, engine, threads), Codecs.parse(wire_dtype)
    with interrupts.raise_on_signal(), _name_adapter_in_error(), Connection(server, connecting) as connection:
        check_base_model(bundle, connection.welcome)
        session = UseSession(connection, adapters, codecs, base_fingerprint=manifest.base_model.fingerprint)
        session.open()
        yield SplitModel(
            bundle, loaded_engine, session, invocation=loaded.invocation if loaded else (), send=send
        )


@contextmanager
def _name_adapter_in_error() -> Iterator[None]:
    try:
        yield
    except NonFiniteError as error:
        text = f"{error}: the adapter is of a run that diverged; train it anew with a lower --lr"
        raise NonFiniteError(text) from None


def generate_greedily(
    model: SplitModel,
    tokenizer: PromptTokenizer,
    prompt: str,
    max_new_tokens: int,
    warn: Callable[[str], None] = lambda _: None,
) -> str:
    """The likeliest continuation of ``prompt``, as an assistant's turn where there is a chat template.

    An adapter that the prompt does not invoke does nothing, as in PEFT: ``warn`` is told.
    """
    ids = tokenizer.encode_prompt(prompt)
    if not len(ids):
        raise DataError("the prompt is empty; say something")
    limit = model.connection.welcome.max_sequence_length
    if len(ids) >= limit:
        raise DataError(f"the prompt has {len(ids)} tokens, the server takes {limit}; say less")
    acts_from = last_occurrence(ids, model.invocation) if model.invocation else None
    if acts_from == len(ids):
        warn("the prompt does not contain this adapter's invocation, so the adapter does nothing")
        acts_from = limit
    produced: list[int] = []
    while len(produced) < max_new_tokens and len(ids) + len(produced) < limit:
        whole = np.array([*ids, *produced], np.int64)
        token = int(model.next_logits(whole, acts_from).argmax())
        if token in tokenizer.stop_token_ids:
            break
        produced.append(token)
    return tokenizer.decode(produced).strip()
