"""``dlora-edge evaluate``: how good an adapter, or the base model, is on some data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlora.edge.choices import UseMode

from .model_options import ModelOptions, UseModeOption
from .options import (
    ColumnsOption,
    CredentialOptions,
    JsonOption,
    MaxLengthOption,
    TooLongOption,
    TrainOnOption,
    with_groups,
)
from .recording import RecordOption, check_record, recording

if TYPE_CHECKING:
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.model.split import SplitModel
    from dlora.edge.model.trunk import TrunkModel
    from dlora.edge.wire.credentials import Credentials
    from dlora.edge.wire.recorder import Recorder


@dataclass(frozen=True)
class EvaluatedModel(ModelOptions):
    """And where its blocks run."""

    mode: UseModeOption = None

    @cached_property  # the adapter's record is read once
    def chosen_mode(self) -> UseMode:
        """That of the options, or that in which the adapter was trained."""
        from dlora.edge.model.device_lora import trained_mode

        return self.mode or trained_mode(self.find_adapter())

    def check(self) -> None:
        """Raise ``UsageError`` for a server that is lacking, or that nobody asks."""
        self.check_mode(self.mode)
        if (mode := self.chosen_mode) != "local":
            self.server_for(mode)

    def warn_of_server(self, warn: Callable[[str], None]) -> None:
        """Say where a server is to be told what an adapter computes that was trained without, or is not asked."""
        from dlora.edge.model.device_lora import trained_mode

        if self.chosen_mode == "local" and self.server is not None:
            warn("the adapter was trained with --mode local: all blocks run here, and --server is not asked")
        if self.mode == "split" and (mode := trained_mode(self.find_adapter())) != "split":
            warn(f"the adapter was trained with --mode {mode}; the server is now sent what it computes, token by token")

    def open(
        self, bundle: Bundle, credentials: Credentials, longest: int, recorder: Recorder | None
    ) -> AbstractContextManager[SplitModel] | AbstractContextManager[TrunkModel]:
        """The model, connected where it has to be. ``longest``: tokens of the longest example."""
        from dlora.edge.model.local_use import open_local
        from dlora.edge.model.trunk_use import open_trunk_to_evaluate
        from dlora.edge.model.use import open_model

        adapter, mode = self.find_adapter(), self.chosen_mode
        if mode != "split":
            self.warn_of_storage(bundle)
        if mode == "local":
            return open_local(bundle, adapter, longest=longest, threads=self.threads, engine=self.engine)
        server, settings = self.server_for(mode), self.settings(credentials, recorder=recorder)
        if mode == "trunk":
            return open_trunk_to_evaluate(bundle, server, adapter, longest=longest, **settings)
        return open_model(bundle, server, adapter, **settings)


@with_groups
def evaluate(
    data: Annotated[Path, typer.Option(help="Data to evaluate on, as for train.")],
    model_options: EvaluatedModel,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    max_length: MaxLengthOption = None,
    too_long: TooLongOption = "error",
    columns: ColumnsOption = None,
    train_on: TrainOnOption = "answers",
    split: Annotated[
        str,
        typer.Option(help="Only what train holds out with the same --split: a share, or auto. By default all."),
    ] = "",
    record: RecordOption = None,
    credential_options: CredentialOptions = CredentialOptions(),
    json_output: JsonOption = False,
) -> None:
    """Loss and accuracy of an adapter, or of the base model, on held-out data."""
    from dataclasses import asdict

    from dlora.edge.data.invocation import uninvoked_line
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.run.display import Display
    from dlora.protocol.wire_codecs import Codecs

    from .reading import DataOptions, read_held_out

    display = Display(json_output=json_output)
    Codecs.parse(model_options.wire_dtype)  # before data is read
    model_options.check()
    check_record(record, model_options.chosen_mode)
    model_options.warn_of_server(display.warn)
    credentials = credential_options.load()
    opened = Bundle.open(model_options.bundle)
    options = DataOptions(data, None, columns, max_length, too_long, train_on, split)
    dataset = read_held_out(options, opened, display)
    from dlora.edge.model.evaluation import evaluate as run_evaluation

    longest = int(dataset.lengths.max())
    with (
        recording(record, opened, display.warn) as recorder,
        model_options.open(opened, credentials, longest, recorder) as model,
    ):
        if model.invocation:
            dataset = dataset.one_answer_each()
            if line := uninvoked_line(dataset, model.invocation):
                display.warn(line)
        if recorder is not None:
            recorder.add_examples((example.ids, example.label_positions) for example in dataset)
        with display.evaluating("", len(dataset)) as advance:
            result = run_evaluation(model, dataset, batch_size, lambda done, _: advance(done))
    display.finish(asdict(result))
