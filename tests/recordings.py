"""Short runs on a tiny model that are recorded, for tests of the audit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving import config, training
from tiny import Tiny
from trunk_runs import trunk_config, trunk_training

from dlora.cloud.audit.observed import Observed, observe
from dlora.cloud.audit.truth import Truth, load_truth
from dlora.edge.data.examples import Dataset
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.recorder import Recorder
from dlora.protocol.recording import read_recording


def record_training(model: Tiny, url: str, directory: Path, dataset: Dataset, **changes: Any) -> Path:
    """Record a run in ``split``, of its ``total_steps``; an evaluation of all data follows."""
    with Recorder(directory) as recorder:
        recorder.add_examples((each.ids, each.label_positions) for each in dataset)
        run = config(**changes)
        connecting = ConnectSettings(recorder=recorder)
        with training(model.bundle, url, run, dataset, connecting) as trainer:
            for _ in range(run.total_steps):
                trainer.run_step()
            trainer.evaluate(dataset)
    return directory


def record_trunk(model: Tiny, url: str, directory: Path, dataset: Dataset, blocks: tuple[int, ...]) -> Path:
    """Record a run in ``trunk``."""
    with Recorder(directory) as recorder:
        recorder.add_examples((each.ids, each.label_positions) for each in dataset)
        run = trunk_config(blocks, total_steps=3)
        connecting = ConnectSettings(recorder=recorder)
        with trunk_training(model.bundle, url, run, dataset, directory / "cache.bin", connecting=connecting) as trainer:
            trainer.run_step()
    return directory


def opened(directory: Path) -> tuple[Observed, Truth]:
    """What the attackers have of a recording, and the truth."""
    recording = read_recording(directory)
    seen = observe(recording)
    return seen, load_truth(directory, recording.id, seen)
