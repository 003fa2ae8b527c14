"""``dlora-edge evaluate`` and ``dlora-edge generate``: an adapter is used, not trained."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    AdapterOption,
    BundleOption,
    ColumnsOption,
    CredentialOptions,
    EngineOption,
    JsonOption,
    MaxLengthOption,
    MaxRetryOption,
    SendOption,
    ServerOption,
    ThreadsOption,
    TooLongOption,
    WireDtypeOption,
    with_groups,
)
from .output import warn

if TYPE_CHECKING:
    from dlora.edge.choices import EngineChoice
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.model.split import SplitModel
    from dlora.edge.wire.credentials import Credentials
    from dlora.protocol.choices import Send


@with_groups
def evaluate(
    bundle: BundleOption,
    server: ServerOption,
    data: Annotated[Path, typer.Option(help="Data to evaluate on, as for train.")],
    adapter: AdapterOption = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    max_length: MaxLengthOption = None,
    too_long: TooLongOption = "error",
    columns: ColumnsOption = None,
    wire_dtype: WireDtypeOption = "fp16",
    send: SendOption = "embeddings",
    threads: ThreadsOption = 0,
    engine: EngineOption = "auto",
    credential_options: CredentialOptions = CredentialOptions(),
    max_retry_s: MaxRetryOption = None,
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
    Codecs.parse(wire_dtype)  # before data is read
    credentials = credential_options.load()
    opened = Bundle.open(bundle)
    fields = parse_columns(columns) if columns else None
    longest = resolve_max_length(max_length, opened.manifest)
    with display.reading() as on_tick:
        (dataset,) = load_datasets(Reading(opened, [data], fields, longest, too_long), on_tick)
    display.say(data_line("data", data, dataset))
    from dlora.edge.model.evaluation import evaluate as run_evaluation

    with _open_model(opened, server, adapter, wire_dtype, send, threads, engine, credentials, max_retry_s) as model:
        if model.invocation:
            dataset = dataset.one_answer_each()
            if line := uninvoked_line(dataset, model.invocation):
                display.warn(line)
        with display.evaluating("", len(dataset)) as advance:
            result = run_evaluation(model, dataset, batch_size, lambda done, _: advance(done))
    display.finish(asdict(result))


@with_groups
def generate(
    bundle: BundleOption,
    server: ServerOption,
    prompt: Annotated[str, typer.Option(help="What to say to the model; a user turn where it has a chat template.")],
    adapter: AdapterOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    wire_dtype: WireDtypeOption = "fp16",
    send: SendOption = "embeddings",
    threads: ThreadsOption = 0,
    engine: EngineOption = "auto",
    credential_options: CredentialOptions = CredentialOptions(),
    max_retry_s: MaxRetryOption = None,
    json_output: JsonOption = False,
) -> None:
    """Answer a prompt, greedily. The whole prefix is sent for every token: slow, and for a look only."""
    from dlora.edge.data.prompt import prompt_tokenizer
    from dlora.edge.engine.bundle import Bundle

    credentials = credential_options.load()
    opened = Bundle.open(bundle)
    with prompt_tokenizer(opened) as tokenizer:
        from dlora.edge.model.use import generate_greedily

        with _open_model(opened, server, adapter, wire_dtype, send, threads, engine, credentials, max_retry_s) as model:
            answer = generate_greedily(model, tokenizer, prompt, max_new_tokens, warn)
    print(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) if json_output else answer)


def _open_model(
    bundle: Bundle,
    server: str,
    adapter: Path | None,
    wire_dtype: str,
    send: Send,
    threads: int,
    engine: EngineChoice,
    credentials: Credentials,
    max_retry_s: float | None,
) -> AbstractContextManager[SplitModel]:
    from dlora.edge.model.use import open_model
    from dlora.edge.wire.connecting import ConnectSettings, Retry
    from dlora.edge.wire.identity import load_device_id

    retry = Retry(max_s=max_retry_s, at_start=bool(max_retry_s))
    connecting = ConnectSettings(credentials, load_device_id(warn=warn), retry, say=warn)
    return open_model(
        bundle,
        server,
        adapter,
        wire_dtype=wire_dtype,
        send=send,
        threads=threads,
        engine=engine,
        connecting=connecting,
    )
