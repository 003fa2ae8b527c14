"""What a client stands on: its settings resolved, and its connections, opened more than once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from dlora.edge.adapters.peft import LoadedAdapter
from dlora.edge.data.examples import Dataset
from dlora.edge.data.loading import Reading, load_datasets
from dlora.edge.data.prompt import PromptTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Engine
from dlora.edge.model.embedding_source import EmbeddingSource
from dlora.edge.seeds import draw_seed
from dlora.edge.settings import Settings
from dlora.edge.training.adapter_training import AdapterTraining
from dlora.edge.training.checkpoint import Checkpoint, load_latest
from dlora.edge.training.defaults import DEFAULT_KIND, DEFAULTS
from dlora.edge.training.resolve import resolve
from dlora.edge.training.resolved import Resolved
from dlora.edge.training.side import DeviceSide, MakeSide, ServerSide
from dlora.edge.training.trainer import Trainer
from dlora.edge.training.trainer_state import trainer_state
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.connection import Connection
from dlora.protocol.errors import CheckpointError, UsageError
from dlora.protocol.manifest import Manifest

from .datum import Datum
from .sampling_client import SamplingClient

_NO_DATA: Final = "of a loop of one's own"


@dataclass(frozen=True)
class ClientOpening:
    """How connections are opened: more than once, where a state is loaded or the adapters are sampled from."""

    bundle: Bundle
    engine: Engine
    config: Resolved
    init: LoadedAdapter | None
    dataset: Dataset | None
    connecting: ConnectSettings

    @contextmanager
    def make_training(self, checkpoint: Checkpoint | None) -> Iterator[AdapterTraining]:
        """Adapters, new or from a checkpoint, connected to what they are trained against; they have to begin yet."""
        config = self.config
        if checkpoint is not None:  # whatever was drawn then, or found
            run = trainer_state(checkpoint).run
            config = msgspec.structs.replace(config, seed=run.seed)
            if config.optimizer.lr is None:
                config = config.with_rate(run.settings["optimizer.lr"])
        with self._make_side() as make_side:
            given = (self.bundle, self.engine, make_side, config)
            if self.dataset is None:
                yield AdapterTraining(*given, _NO_DATA, init=self.init, checkpoint=checkpoint)
            else:
                yield Trainer(*given, self.dataset, init=self.init, checkpoint=checkpoint, begins=False)

    @contextmanager
    def _make_side(self) -> Iterator[MakeSide]:
        server = self.config.server.server
        if server is None:
            with closing(EmbeddingSource(self.bundle, self.engine)) as source:
                yield partial(DeviceSide, source=source)
        else:
            with Connection(server, self.connecting) as connection:
                yield partial(ServerSide, connection=connection)

    def open_sampling(self, adapter: Path, tokenizer: PromptTokenizer) -> AbstractContextManager[SamplingClient]:
        """A client that samples with a saved adapter."""
        device, server, connecting = self.config.device, self.config.server, self.connecting
        return SamplingClient.create(
            self.bundle.path,
            server.server,
            adapter=adapter,
            wire_dtype=server.wire_dtype,
            threads=device.threads,
            engine=device.engine,
            credentials=connecting.credentials,
            max_retry_s=connecting.retry.max_s,
            tokenizer=tokenizer,
        )


def datasets_of(settings: Settings, bundle: Bundle, data: Sequence[Datum] | None) -> list[Dataset]:
    """To train on, and held out, as the command has them; none: a loop of one's own brings its data.

    Raises ``UsageError`` for ``data`` that the command could not train on.
    """
    if data is not None:
        if any(not datum.is_plain for datum in data):
            raise UsageError("data that settings are chosen for must have the next token as each target, with weight 1")
        return [Dataset.of([(datum.tokens, datum.rows) for datum in data])]  # type: ignore[misc]
    return [] if settings.data.data is None else load_datasets(Reading.of(settings.data, bundle))


def resolve_settings(
    settings: Settings, manifest: Manifest, init: LoadedAdapter | None, datasets: Sequence[Dataset]
) -> tuple[Resolved, Dataset | None]:
    """The run and what it trains on, as the command has it; without data, what takes none. Raises ``UsageError``."""
    if settings.server.passes == "auto":
        raise UsageError("passes: auto is measured by dlora-edge train; choose live, or 2,2")
    drawn = draw_seed() if settings.training.seed is None else (settings.training.seed,)
    if datasets:
        config, (dataset, *_) = resolve(settings, manifest, init, datasets)
        # A loop may bring other texts than the data have: nothing is kept for those.
        return msgspec.structs.replace(config, seed=drawn, keeps_outputs=False), dataset
    given: dict[str, Any] = {"active_from": settings.adapter.active_from or "start"}
    if given["active_from"] != "start":
        raise UsageError("active_from: where answers begin, data say; give some, or leave that out")
    kind = settings.adapter.kind or DEFAULT_KIND
    if DEFAULTS[kind].basis is not None and init is None:
        given["basis"] = settings.adapter.basis or "weights"
        if given["basis"] == "data":
            raise UsageError("basis: a basis of data needs some; give data, or take weights")
    if settings.optimizer.lr is None:
        given["lr"] = DEFAULTS[kind].lr
    if settings.training.steps is None:
        given |= {"schedule": "constant", "warmup": 0.0}
    config, _ = resolve(settings.replaced(**given), manifest, init, [])
    return msgspec.structs.replace(config, seed=drawn), None


def read_state(directory: Path) -> Checkpoint:
    """The newest checkpoint in a directory of ``save_state``. Raises ``CheckpointError`` where there is none."""
    checkpoint = load_latest(directory)
    if checkpoint is None:
        raise CheckpointError(f"{directory} has no saved state; give a directory of save_state")
    return checkpoint
