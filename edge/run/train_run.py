"""What a training run is made of, before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dlora.edge.adapters.peft import LoadedAdapter
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.model.cache_key import CacheKey
from dlora.edge.training.resolved import Resolved
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.recorder import Recorder
from dlora.edge.wire.spans import Spans

from .watcher import RunWatcher


@dataclass(frozen=True)
class TrainRun:
    """What to run, and with what.

    Attributes:
        config: all settings.
        dataset, eval_dataset: as ``resolve`` gives them.
        init: an adapter to start from.
        resume: whether it goes on from the last checkpoint.
        connecting: how its server is reached when it begins.
        cache_key: what hidden states that are kept are encrypted with.
        recorder: keeps what crosses, and the truth beside it.
        watchers: who follow the run; spans: what happens when, where one of them wants to know.
    """

    bundle: Bundle
    config: Resolved
    dataset: Dataset
    eval_dataset: Dataset | None = None
    init: LoadedAdapter | None = None
    resume: bool = False
    connecting: ConnectSettings = field(default_factory=ConnectSettings)
    cache_key: CacheKey | None = None
    recorder: Recorder | None = None
    watchers: Sequence[RunWatcher] = ()
    spans: Spans = field(default_factory=Spans)

    @property
    def out(self) -> Path:
        """Its directory."""
        assert self.config.saving.out is not None
        return self.config.saving.out

    @property
    def datasets(self) -> list[Dataset]:
        """What is trained on, and what is held out where something is."""
        return [self.dataset, *([] if self.eval_dataset is None else [self.eval_dataset])]
