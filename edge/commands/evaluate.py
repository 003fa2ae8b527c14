"""``dlora-edge evaluate``: how good an adapter, or the base model, is on some data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlora.edge.choices import AnswerScore, UseMode
from dlora.protocol.errors import UsageError

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
from .recording import RecordOption, check_record
from .sampling_options import MaxNewTokensOption

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
    data: Annotated[
        Path, typer.Option(help="Data to evaluate on, as for train; of a directory with parts, the test part.")
    ],
    model_options: EvaluatedModel,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Compare with this adapter, or with base, the base model; may be given several times."),
    ] = None,
    answers: Annotated[
        AnswerScore | None,
        typer.Option(
            help="Score answers too. Generated ones: exact, the reference but for blanks; contains it; regex: "
            "--pattern finds the same in both. Or likelihood: of --choices, the reference is the likeliest."
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="For --answers regex; by default any choice that the data name ('Answer format: a/b')."),
    ] = None,
    choices: Annotated[
        str | None, typer.Option(help="Answers to choose among, separated by commas, where rows name none.")
    ] = None,
    max_new_tokens: MaxNewTokensOption = 64,
    limit: Annotated[int | None, typer.Option(help="Take so many rows, the first ones.", min=1)] = None,
    show: Annotated[
        int, typer.Option(help="How many answers to show side by side, those that differ first.", min=0)
    ] = 3,
    save: Annotated[
        Path | None, typer.Option(help="Keep every question with its answers in this file, a JSON object a line.")
    ] = None,
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
    """Loss, accuracy and answers of an adapter, or of the base model, with 95 % intervals; and how others compare.

    Example:  dlora-edge evaluate --bundle build/smollm2 --server ws://127.0.0.1:8765 --data test.jsonl
    --adapter my-adapter --against base --answers contains
    """
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.run.display import Display
    from dlora.protocol.wire_codecs import Codecs

    from .evaluation import Asking, evaluate_models
    from .reading import DataOptions, split_of_run

    display = Display(json_output=json_output)
    Codecs.parse(model_options.wire_dtype)  # before data is read
    names = [str(model_options.adapter or "base"), *(against or [])]
    models = [replace(model_options, adapter=None if name == "base" else Path(name)) for name in names]
    for each in models:
        each.check()
        check_record(record, each.chosen_mode)
        each.warn_of_server(display.warn)
    asking = None
    if answers is not None:
        asking = Asking.of(answers, pattern=pattern, choices=choices, max_new_tokens=max_new_tokens)
    elif given := [
        option
        for option, value in (("--pattern", pattern), ("--choices", choices), ("--save", save))
        if value is not None
    ]:
        raise UsageError(f"{given[0]} needs --answers, which says how answers are scored")
    credentials = credential_options.load()
    split = split_of_run(model_options.find_adapter()) if split == "auto" else split
    options = DataOptions(data, None, columns, max_length, too_long, train_on, split)
    opened = Bundle.open(model_options.bundle)
    result, answered = evaluate_models(
        [*zip(names, models, strict=True)], opened, options, credentials, display, asking=asking, limit=limit,
        batch_size=batch_size, record=record,
    )  # fmt: skip
    if save is not None:
        answered.save(save)
    if json_output:
        display.finish(result)
    else:
        answered.show(result, show)
