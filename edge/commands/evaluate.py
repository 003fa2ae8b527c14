"""``dlora-edge evaluate``: how good an adapter, or the base model, is on some data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlora.edge.choices import AnswerScore
from dlora.edge.settings import Settings
from dlora.protocol.errors import UsageError

from .model_options import CHANGES, MODEL, UsedModel, check_model
from .options import AdapterOption, JsonOption, LendOption, RecordOption
from .sampling_options import MaxNewTokensOption
from .settings_options import takes_settings


@takes_settings(
    *MODEL, "data", "hold_out", "train_on", "columns", "max_length", "too_long", "batch_size",
    required=("bundle", "data"),
    changes={
        **CHANGES,
        "data": {"help": "Data to evaluate on, as for train; of a directory with parts, the test part."},
        "hold_out": {
            "default": "",
            "help": "Only what train holds out with the same --hold-out: a share, or auto. By default all.",
        },
        "passes": CHANGES["passes"] | {"default": "live"},
    },
)  # fmt: skip
def evaluate(
    settings: Settings,
    adapter: AdapterOption = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Compare with this adapter, or with base, the base model; may be given several times."),
    ] = None,
    answers: Annotated[
        AnswerScore | None,
        typer.Option(
            metavar="HOW",
            help="Score answers too. Generated ones: exact, the reference but for blanks; contains it; regex: "
            "--pattern finds the same in both. Or likelihood: of --choices, the reference is the likeliest.",
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
    lend_adapter: LendOption = False,
    record: RecordOption = None,
    json_output: JsonOption = False,
) -> None:
    """Loss, accuracy and answers of an adapter, or of the base model, with 95 % intervals; and how others compare.

    Example:  dlora-edge evaluate --bundle build/smollm2 --server ws://127.0.0.1:8765 --data test.jsonl
    --adapter my-adapter --against base --answers contains
    """
    from dlora.edge.run.display import Display
    from dlora.edge.run.reading import hold_out_of_run
    from dlora.edge.wire.recorder import check_record

    from .evaluation import Asking, evaluate_models

    display = Display(json_output=json_output)
    check_model(settings)  # before data is read
    check_record(record, is_local=settings.placement.device_blocks == "all")
    asking = None
    if answers is not None:
        asking = Asking.of(answers, pattern=pattern, choices=choices, max_new_tokens=max_new_tokens)
    else:
        for option, value in (("--pattern", pattern), ("--choices", choices), ("--save", save)):
            if value is not None:
                raise UsageError(f"{option} needs --answers, which says how answers are scored")
    names = [str(adapter or "base"), *(against or [])]
    used = UsedModel.of(settings, None, lends=lend_adapter)
    models = {name: used.with_adapter(None if name == "base" else Path(name)) for name in names}
    if settings.data.hold_out == "auto":
        settings = settings.replaced(hold_out=hold_out_of_run(models[names[0]].find_adapter()))
    for each in models.values():
        each.check_server()
        each.warn_of_server()
    result, answered = evaluate_models(
        [(name, models[name]) for name in names], settings, display, asking=asking, limit=limit, record=record
    )
    if save is not None:
        answered.save(save)
    if json_output:
        display.finish(result)
    else:
        answered.show(result, show)
