"""Using an adapter without training it: an open model for evaluation, and greedy answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from dlora.edge.adapters.fitting import check_base_model, load_weights
from dlora.edge.adapters.peft import load_adapter
from dlora.edge.adapters.units import AdapterSet
from dlora.edge.data.prompt import PromptTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import EngineName, make_engine
from dlora.edge.wire.connection import Connection
from dlora.edge.wire.dialing import Dialing
from dlora.protocol import interrupts
from dlora.protocol import messages as m
from dlora.protocol.errors import DataError, DivergedError, RemoteProtocolError
from dlora.protocol.kill_revive import KillReviveConfig, UnitState
from dlora.protocol.targets import choose_groups, groups_of
from dlora.protocol.tensors import WireDtype

from .split import SplitModel


@contextmanager
def open_model(
    bundle: Bundle,
    server: str,
    adapter: Path | None,
    *,
    wire_dtype: WireDtype,
    threads: int = 0,
    engine: EngineName | Literal["auto"] = "auto",
    dialing: Dialing | None = None,
) -> Iterator[SplitModel]:
    """A split model with a saved adapter, or none; blocks without an adapter do not exchange."""
    manifest = bundle.manifest
    loaded = load_adapter(adapter) if adapter else None
    groups = groups_of(manifest, loaded.modules) if loaded else choose_groups(manifest)
    live = list(range(len(groups))) if loaded else []
    # A session of single groups, all of which stay active, or none where there is no adapter.
    config = KillReviveConfig(unit="group", score="static", static=tuple(live), active_fraction=0.0)
    rank = next(iter(loaded.modules.values())).lora_A.shape[0] if loaded else manifest.defaults.r
    adapters = AdapterSet.create(
        groups, rank=rank, scaling=manifest.defaults.lora_alpha / rank, seed=(0,), unit="group", kill_every=1
    )
    if loaded is not None:
        load_weights(adapters, loaded)
    runs = make_engine(bundle, engine, threads)
    opening = m.OpenSession(
        base_fingerprint=manifest.base_model.fingerprint,
        groups=groups,
        wire_dtype=wire_dtype,
        kill_revive=config,
        seed=0,
        total_steps=1,
    )
    with interrupts.raising(), _blaming_the_adapter(), Connection(server, dialing) as connection:
        check_base_model(bundle, connection.welcome)

        def open_session() -> None:
            adapters.obey(connection.open(opening).units.data)
            active = [index for index, unit in enumerate(adapters.units) if unit.state is not UnitState.KILLED]
            if active != live:
                raise RemoteProtocolError(
                    f"the server calls {len(active)} units active, not the {len(live)} that were asked for; "
                    "its fault: use another server"
                )

        open_session()
        yield SplitModel(
            bundle, runs, connection, adapters, wire_dtype=wire_dtype, on_signal=lambda _: None, reopen=open_session
        )


@contextmanager
def _blaming_the_adapter() -> Iterator[None]:
    try:
        yield
    except DivergedError as error:
        text = f"{error}: the adapter is of a run that diverged; train it anew with a lower --lr"
        raise DivergedError(text) from None


def generate_greedily(model: SplitModel, tokenizer: PromptTokenizer, prompt: str, max_new_tokens: int) -> str:
    """The likeliest continuation of ``prompt``, as an assistant's turn where there is a chat template."""
    ids = tokenizer.encode_prompt(prompt)
    if not len(ids):
        raise DataError("the prompt is empty; say something")
    produced: list[int] = []
    limit = model.connection.welcome.max_sequence_length
    if len(ids) >= limit:
        raise DataError(f"the prompt has {len(ids)} tokens, the server takes {limit}; say less")
    while len(produced) < max_new_tokens and len(ids) + len(produced) < limit:
        whole = np.array([*ids, *produced], np.int64)
        token = int(model.next_logits(whole).argmax())
        if token in tokenizer.stop_token_ids:
            break
        produced.append(token)
    return tokenizer.decode(produced).strip()
