"""``dlora-edge evaluate``: how good an adapter, or the base model, is on some data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .model_options import ModelOptions, find_adapter
from .options import (
    AdapterOption,
    BundleOption,
    ColumnsOption,
    CredentialOptions,
    EngineOption,
    JsonOption,
    MaxLengthOption,
    MaxRetryOption,
    OptionalServerOption,
    SendOption,
    ThreadsOption,
    TooLongOption,
    WireDtypeOption,
    with_groups,
)

if TYPE_CHECKING:
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.model.split import SplitModel
    from dlora.edge.model.trunk import TrunkModel
    from dlora.edge.wire.credentials import Credentials


@dataclass(frozen=True)
class EvaluatedModel:
    """As ``ModelOptions``, of a model that may need no server."""

    bundle: BundleOption
    server: OptionalServerOption = None
    mode: Annotated[
        Literal["split", "local"],
        typer.Option(metavar="MODE", help="split: blocks run on the server. local: all of them here, without one."),
    ] = "split"
    adapter: AdapterOption = None
    wire_dtype: WireDtypeOption = "fp16"
    send: SendOption = "embeddings"
    threads: ThreadsOption = 0
    engine: EngineOption = "auto"
    max_retry_s: MaxRetryOption = None

    def check(self) -> None:
        """Raise ``UsageError`` for a server that is lacking, or that nobody asks."""
        from dlora.protocol.errors import UsageError

        if self.mode == "split" and self.server is None:
            raise UsageError("--mode split needs --server, which runs the blocks; --mode local needs none")
        if self.mode == "local" and self.server is not None:
            raise UsageError("--mode local asks no server: leave --server out")

    def warn_of_server(self, warn: Callable[[str], None]) -> None:
        """Say where a server is to be told what an adapter computes that was trained without."""
        from dlora.edge.adapters.store import default_directory
        from dlora.edge.model.device_lora import trained_mode

        adapter = find_adapter(self.adapter, default_directory())
        if self.mode == "split" and (mode := trained_mode(adapter)) != "split":
            warn(f"the adapter was trained with --mode {mode}; the server is now sent what it computes, token by token")

    def open(
        self, bundle: Bundle, credentials: Credentials, longest: int
    ) -> AbstractContextManager[SplitModel] | AbstractContextManager[TrunkModel]:
        """The model, connected where it has to be. ``longest``: tokens of the longest example."""
        if self.server is not None:
            options = ModelOptions(
                bundle=self.bundle,
                server=self.server,
                adapter=self.adapter,
                wire_dtype=self.wire_dtype,
                send=self.send,
                threads=self.threads,
                engine=self.engine,
                max_retry_s=self.max_retry_s,
            )
            return options.open(bundle, credentials)
        from dlora.edge.adapters.store import default_directory
        from dlora.edge.model.local_use import open_local

        adapter = find_adapter(self.adapter, default_directory())
        return open_local(bundle, adapter, longest=longest, threads=self.threads, engine=self.engine)


@with_groups
def evaluate(
    data: Annotated[Path, typer.Option(help="Data to evaluate on, as for train.")],
    model_options: EvaluatedModel,
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
    model_options.check()
    model_options.warn_of_server(display.warn)
    credentials = credential_options.load()
    opened = Bundle.open(model_options.bundle)
    fields = parse_columns(columns) if columns else None
    longest = resolve_max_length(max_length, opened.manifest)
    with display.reading() as on_tick:
        (dataset,) = load_datasets(Reading(opened, [data], fields, longest, too_long), on_tick)
    display.say(data_line("data", data, dataset))
    from dlora.edge.model.evaluation import evaluate as run_evaluation

    with model_options.open(opened, credentials, int(dataset.lengths.max())) as model:
        if model.invocation:
            dataset = dataset.one_answer_each()
            if line := uninvoked_line(dataset, model.invocation):
                display.warn(line)
        with display.evaluating("", len(dataset)) as advance:
            result = run_evaluation(model, dataset, batch_size, lambda done, _: advance(done))
    display.finish(asdict(result))
