"""How long a server waits for a device: for what the device does, and as long as that device was found to need."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from families import VOCABULARY, save_tiny, tiny_model
from serving import config, random_dataset, serving, training

from dlora.cloud import executor
from dlora.cloud.base_model import BaseModel
from dlora.cloud.executor import ComputeGate
from dlora.cloud.quotas import QuotaLimits
from dlora.export.bundle import ExportSettings, export_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("patience")
    save_tiny(directory / "model")
    export_bundle(ExportSettings(str(directory / "model"), directory / "bundle", rank=4, alpha=8.0))
    return directory / "bundle"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.from_model(tiny_model("llama"), "tiny")


TURN_S = 1000.0  # more than a step's least deadline


def test_a_device_answers_neither_for_the_turns_of_others_nor_pays_for_them(
    base: BaseModel, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_s = 0.0
    waiting = ComputeGate.waiting

    @contextmanager
    def wait_for_a_long_turn(gate: ComputeGate) -> Iterator[None]:
        nonlocal late_s
        with waiting(gate):
            yield
        late_s += TURN_S

    monkeypatch.setattr(ComputeGate, "waiting", wait_for_a_long_turn)
    monkeypatch.setattr(executor, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late_s))
    with (
        serving(base, quotas=QuotaLimits(compute_s_per_hour=1e6)) as server,
        training(bundle, server.url, config(), random_dataset(VOCABULARY)) as trainer,
    ):
        trainer.run_step()
        trainer.settle()
        assert late_s > 2 * TURN_S
        (caller,) = server.server.service.quotas._callers.values()
        assert caller.compute._used < TURN_S
