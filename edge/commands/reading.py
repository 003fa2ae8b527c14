"""Reads the data that a command's options name, and says what was found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dlora.edge.choices import TooLong, TrainOn
from dlora.edge.data.loading import Reading, load_datasets, resolve_max_length
from dlora.edge.data.read_settings import ReadSettings
from dlora.edge.data.records import parse_columns
from dlora.edge.data.split import parse_split
from dlora.edge.run.display import Display
from dlora.edge.run.plan import data_line
from dlora.edge.run.run_file import RunSettings, load_run_file
from dlora.protocol.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from dlora.edge.data.examples import Dataset
    from dlora.edge.engine.bundle import Bundle


@dataclass(frozen=True)
class DataOptions:
    """Options of the same names."""

    data: Path
    eval_data: Path | None
    columns: str | None
    max_length: int | None
    too_long: TooLong
    train_on: TrainOn
    split: str

    @classmethod
    def of(cls, settings: RunSettings) -> DataOptions:
        """Those of a run."""
        return cls(
            data=Path(settings.data),
            eval_data=settings.path("eval_data"),
            columns=settings.columns,
            max_length=settings.max_length,
            too_long=settings.too_long,
            train_on=settings.train_on,
            split=settings.split,
        )

    def read_settings(self, bundle: Bundle) -> ReadSettings:
        """How rows are read. Raises ``UsageError``."""
        columns = parse_columns(self.columns) if self.columns else None
        return ReadSettings(columns, resolve_max_length(self.max_length, bundle.manifest), self.too_long, self.train_on)

    def test_settings(self, bundle: Bundle) -> ReadSettings:
        """Likewise for data to evaluate on: a data set's test part, or of its train part what ``split`` holds out."""
        return replace(self.read_settings(bundle), part="train" if self.split else "test")


def read_data(options: DataOptions, bundle: Bundle, display: Display) -> list[Dataset]:
    """The data to train on, and those to evaluate on: of ``eval_data``, or what is held out of ``data``.

    While this process is small and has no threads. Raises ``UsageError``, ``DataError`` and ``BundleError``.
    """
    paths = [path for path in (options.data, options.eval_data) if path is not None]
    split = 0.0 if options.eval_data is not None else parse_split(options.split)
    datasets = _load(Reading(bundle, paths, options.read_settings(bundle), split), display)
    if len(datasets) > len(paths):
        held = datasets[1]
        rows = len(datasets[0]) + len(held)
        what = "examples" if held.facts.form == "documents" else "rows"
        display.say(data_line("data", options.data, datasets[0]))
        display.say(
            f"held out: {len(held):,} of {rows:,} {what}, to see how well the rest teaches; --split 0 trains on all, "
            "--eval names data of your own"
        )
        return datasets
    for name, path, dataset in zip(("data", "held out"), paths, datasets, strict=False):
        display.say(data_line(name, path, dataset))
    return datasets


def split_of_run(adapter: Path | None) -> str:
    """What ``auto`` is for data to evaluate on: as the run that made the adapter split them, where that is known."""
    try:
        settings = None if adapter is None else load_run_file(adapter).settings
    except CheckpointError:  # no run's, or one of another version
        settings = None
    return "auto" if settings is None or settings.eval_data is not None else settings.split


def read_held_out(options: DataOptions, bundle: Bundle, display: Display) -> Dataset:
    """The part of ``data`` that ``train`` with the same ``split`` holds out; all of them where that is empty.

    Raises likewise, and ``DataError`` where nothing is held out.
    """
    split = parse_split(options.split) if options.split else 0.0
    datasets = _load(Reading(bundle, [options.data], options.test_settings(bundle), split), display)
    if options.split and len(datasets) < 2:
        raise DataError(
            f"{options.data}: --split {options.split} holds nothing out of these data, nor does train; leave it out"
        )
    display.say(data_line("data" if not options.split else "held out", options.data, datasets[-1]))
    return datasets[-1]


def _load(reading: Reading, display: Display) -> list[Dataset]:
    with display.reading() as on_tick:
        return load_datasets(reading, on_tick)
