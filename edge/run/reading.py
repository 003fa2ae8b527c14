"""Reads the data that settings name, and says what was found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dlora.edge.data.examples import Dataset
from dlora.edge.data.loading import Reading, load_datasets
from dlora.edge.data.read_settings import ReadSettings, read_settings
from dlora.edge.engine.bundle import Bundle
from dlora.edge.settings import Data
from dlora.protocol.errors import CheckpointError, DataError
from dlora.protocol.manifest import Manifest

from .display import Display
from .plan import data_line
from .run_file import load_run_file


def test_settings(data: Data, manifest: Manifest) -> ReadSettings:
    """Likewise for data to evaluate on: a data set's test part, or of its train part what ``--hold-out`` holds out."""
    return replace(read_settings(data, manifest), part="train" if data.hold_out else "test")


def read_data(data: Data, bundle: Bundle, display: Display) -> list[Dataset]:
    """The data to train on, and those to evaluate on: of ``--eval``, or what is held out of ``--data``.

    While this process is small and has no threads. Raises ``UsageError``, ``DataError`` and ``BundleError``.
    """
    assert data.data is not None  # the command asks for it
    reading = Reading.of(data, bundle)
    datasets = _load(reading, display)
    if len(datasets) == len(reading.paths):
        for name, path, dataset in zip(("data", "held out"), reading.paths, datasets, strict=False):
            display.say(data_line(name, path, dataset))
        return datasets
    dataset, held = datasets
    what = "examples" if held.facts.form == "documents" else "rows"
    display.say(data_line("data", data.data, dataset))
    display.say(
        f"held out: {len(held):,} of {len(dataset) + len(held):,} {what}, to see how well the rest teaches; "
        "--hold-out 0 trains on all, --eval names data of your own"
    )
    return datasets


def hold_out_of_run(adapter: Path | None) -> str:
    """What ``auto`` is for data to evaluate on: as the run that made the adapter held them out, where that is known."""
    try:
        data = None if adapter is None else load_run_file(adapter).settings.data
    except CheckpointError:  # no run's, or one of another version
        data = None
    return "auto" if data is None or data.eval is not None else data.hold_out


def read_held_out(data: Data, bundle: Bundle, display: Display) -> Dataset:
    """The part of the data that ``train`` with the same ``--hold-out`` holds out; all of them where that is empty.

    Raises likewise, and ``DataError`` where nothing is held out.
    """
    assert data.data is not None  # the command asks for it
    datasets = _load(Reading(bundle, [data.data], test_settings(data, bundle.manifest)), display)
    if data.hold_out and len(datasets) < 2:
        raise DataError(
            f"{data.data}: --hold-out {data.hold_out} holds nothing out of these data, nor does train; leave it out"
        )
    display.say(data_line("data" if not data.hold_out else "held out", data.data, datasets[-1]))
    return datasets[-1]


def _load(reading: Reading, display: Display) -> list[Dataset]:
    with display.reading() as on_tick:
        return load_datasets(reading, on_tick)
