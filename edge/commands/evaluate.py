"""``dlora-edge evaluate``: how good an adapter, or the base model, is on some data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .model_options import ModelOptions
from .options import ColumnsOption, CredentialOptions, JsonOption, MaxLengthOption, TooLongOption, with_groups


@with_groups
def evaluate(
    data: Annotated[Path, typer.Option(help="Data to evaluate on, as for train.")],
    model_options: ModelOptions,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    max_length: MaxLengthOption = None,
    too_long: TooLongOption = "error",
    columns: ColumnsOption = None,
    credential_options: CredentialOptions = CredentialOptions(),
    json_output: JsonOption = False,
) -> None:
    """Loss and accuracy of an adapter, or of the base model, on held-out data."""
    from dataclasses import asdict

    from dlora.edge.data.invocation import uninvoked_line
    from dlora.edge.data.loading import Reading, load_datasets, resolve_max_length
    from dlora.edge.data.records import parse_columns
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.run.display import Display
    from dlora.edge.run.plan import data_line
    from dlora.protocol.wire_codecs import Codecs

    display = Display(json_output=json_output)
    Codecs.parse(model_options.wire_dtype)  # before data is read
    credentials = credential_options.load()
    opened = Bundle.open(model_options.bundle)
    fields = parse_columns(columns) if columns else None
    longest = resolve_max_length(max_length, opened.manifest)
    with display.reading() as on_tick:
        (dataset,) = load_datasets(Reading(opened, [data], fields, longest, too_long), on_tick)
    display.say(data_line("data", data, dataset))
    from dlora.edge.model.evaluation import evaluate as run_evaluation

    with model_options.open(opened, credentials) as model:
        if model.invocation:
            dataset = dataset.one_answer_each()
            if line := uninvoked_line(dataset, model.invocation):
                display.warn(line)
        with display.evaluating("", len(dataset)) as advance:
            result = run_evaluation(model, dataset, batch_size, lambda done, _: advance(done))
    display.finish(asdict(result))
