"""The command line of ``dlora-edge``. Each command's work is in a module of its own, loaded when it runs."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlora.edge.run import pause
from dlora.protocol.limits import MAX_RANK, MAX_THREADS
from dlora.protocol.version import SOFTWARE_VERSION

from .help_panels import KR, PanelledCommand

if TYPE_CHECKING:
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.model.split import SplitModel
    from dlora.edge.wire.credentials import Credentials

app = typer.Typer(
    help="Fine-tune a language model that this device cannot hold. Data, labels, adapters stay here.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


class WireDtype(StrEnum):
    """How hidden states and gradients cross the wire."""

    fp16 = "fp16"
    fp32 = "fp32"


class Schedule(StrEnum):
    """Learning-rate schedules."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Score(StrEnum):
    """What kill-and-revive ranks units by."""

    change = "change"
    sensitivity = "sensitivity"
    grad = "grad"
    norm = "norm"
    random = "random"
    static = "static"
    last = "last"


class UnitKind(StrEnum):
    """What kill-and-revive switches."""

    block = "block"
    group = "group"


class OnKill(StrEnum):
    """What a killed unit does at first."""

    fade = "fade"
    bypass = "bypass"
    hold_forward = "hold_forward"


class Keep(StrEnum):
    """Which adapter a run saves in the end."""

    last = "last"
    best = "best"


class TooLong(StrEnum):
    """What happens to examples longer than --max-length."""

    error = "error"
    truncate = "truncate"
    skip = "skip"


class EngineChoice(StrEnum):
    """What runs the bundle's graphs."""

    auto = "auto"
    onnx = "onnx"
    executorch = "executorch"


class EnginesChoice(StrEnum):
    """What selftest tries."""

    all = "all"
    onnx = "onnx"
    executorch = "executorch"


BundleOption = Annotated[Path, typer.Option("--bundle", help="Bundle directory, from dlora-export.")]
ServerOption = Annotated[str, typer.Option("--server", help="Server address, ws://HOST:PORT or wss://HOST:PORT.")]
TokenFileOption = Annotated[
    Path | None, typer.Option(help="File with the token that lets this device in; else DLORA_TOKEN.")
]
CaOption = Annotated[Path | None, typer.Option(help="Trust only servers that this authority signed (PEM).")]
ClientCertOption = Annotated[Path | None, typer.Option(help="This device's certificate (PEM).")]
ClientKeyOption = Annotated[Path | None, typer.Option(help="Its key, where that is another file (PEM).")]
InsecureOption = Annotated[bool, typer.Option("--insecure", help="Send the token over plain ws:// all the same.")]
MaxRetryOption = Annotated[
    float | None,
    typer.Option(
        help="Seconds that the server may be gone, or say nothing new; 0: give up as soon as it is lost. Without it: "
        "for ever once the run has begun, but a first connection that fails ends it.",
        min=0,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
MaxLengthOption = Annotated[
    int | None, typer.Option(help="Longest example, in tokens; 512 by default, or what the model takes.", min=2)
]
TooLongOption = Annotated[TooLong, typer.Option(help="Examples over --max-length: error, truncate or skip them.")]
ColumnsOption = Annotated[str | None, typer.Option(help="For CSV: prompt=COLUMN,completion=COLUMN or text=COLUMN.")]

# A typing slip must not fill the memory, and the wire takes no more.
MAX_COUNT, MAX_SEED = 10**9, 2**32 - 1

ThreadsOption = Annotated[int, typer.Option(help="Compute threads; 0: one for each core.", min=0, max=MAX_THREADS)]

EngineOption = Annotated[
    EngineChoice,
    typer.Option(help="What runs the graphs: onnx, executorch or auto, which is ONNX Runtime, or else what there is."),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dlora-edge {SOFTWARE_VERSION}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(cls=PanelledCommand)
def train(
    bundle: BundleOption,
    server: ServerOption,
    data: Annotated[Path, typer.Option(help="Training data: .jsonl (messages, prompt/completion or text) or .csv.")],
    out: Annotated[Path, typer.Option(help="Where the PEFT adapter, checkpoints and metrics go.")],
    eval_data: Annotated[Path | None, typer.Option("--eval", help="Held-out data of the same form.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", min=0.0)] = 1.0,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; overrides --epochs.", min=1, max=MAX_COUNT)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences of a micro-batch.", min=1)] = 4,
    grad_accum: Annotated[int, typer.Option(help="Micro-batches of a step.", min=1)] = 1,
    max_length: MaxLengthOption = None,
    too_long: TooLongOption = TooLong.error,
    columns: ColumnsOption = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", min=0.0, max=1e3)] = 1e-3,
    schedule: Annotated[
        Schedule, typer.Option(help="Learning rate after warm-up: constant, linear or cosine.")
    ] = Schedule.linear,
    warmup: Annotated[
        float, typer.Option(help="Warm-up: steps, or a share of them if below 1.", min=0.0, max=MAX_COUNT)
    ] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="AdamW's decoupled weight decay.", min=0.0, max=1e3)] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Clip gradients to this norm; 0: never.", min=0.0)] = 1.0,
    rank: Annotated[int | None, typer.Option(help="LoRA rank; the bundle's by default.", min=1, max=MAX_RANK)] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha; the bundle's by default.")] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="What gets adapters: names, separated by commas, or all-linear; the bundle's by default."),
    ] = None,
    blocks: Annotated[str, typer.Option(help="Adapters in these blocks only: 0,3,26-29.")] = "",
    seed: Annotated[
        int | None,
        typer.Option(
            help="The same number gives the same run again. By default random, and known to this device only.",
            min=0,
            max=MAX_SEED,
        ),
    ] = None,
    init_adapter: Annotated[Path | None, typer.Option(help="Start from this PEFT LoRA adapter.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    save_every: Annotated[int, typer.Option(help="Save checkpoint and adapter every so many steps.", min=1)] = 50,
    eval_every: Annotated[
        int,
        typer.Option(
            help="Evaluate every so many steps; 0: before and after, or with --keep best or --patience ten times.",
            min=0,
        ),
    ] = 0,
    keep: Annotated[
        Keep, typer.Option(help="Which adapter to save in the end: the last, or the one best on --eval.")
    ] = Keep.last,
    patience: Annotated[
        int | None, typer.Option(help="End after so many evaluations in a row that are no better.", min=1)
    ] = None,
    wire_dtype: Annotated[WireDtype, typer.Option(help="Precision on the wire: fp16 or fp32.")] = WireDtype.fp16,
    threads: ThreadsOption = 0,
    engine: EngineOption = EngineChoice.auto,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    client_cert: ClientCertOption = None,
    client_key: ClientKeyOption = None,
    insecure: InsecureOption = False,
    max_retry_s: MaxRetryOption = None,
    exchange_timeout_s: Annotated[
        float, typer.Option(help="Least seconds of silence after which the server counts as lost.", min=1)
    ] = 120.0,
    pause_when: Annotated[list[str] | None, typer.Option("--pause-when", help=pause.HELP)] = None,
    json_output: JsonOption = False,
    active_fraction: Annotated[
        float,
        typer.Option(
            help="Share of units that stay active; 1: all. Less saves traffic and costs quality.",
            min=0.0,
            max=1.0,
            rich_help_panel=KR,
        ),
    ] = 1.0,
    kr_score: Annotated[
        Score,
        typer.Option(
            help="What units are ranked by: change, sensitivity, grad or norm; or the plain rivals random, static or "
            "last.",
            rich_help_panel=KR,
        ),
    ] = Score.change,
    kr_unit: Annotated[UnitKind, typer.Option(help="What is switched.", rich_help_panel=KR)] = UnitKind.block,
    kr_warmup_steps: Annotated[
        int, typer.Option(help="Steps before the first kill.", min=0, max=MAX_COUNT, rich_help_panel=KR)
    ] = 20,
    kr_ramp_fraction: Annotated[
        float, typer.Option(help="Share of steps at which the budget is down.", min=0, max=1, rich_help_panel=KR)
    ] = 0.25,
    kr_kill_every: Annotated[
        int, typer.Option(help="Steps between kills.", min=1, max=MAX_COUNT, rich_help_panel=KR)
    ] = 25,
    kr_revive_every: Annotated[
        int, typer.Option(help="Steps between revivals; 0: never.", min=0, max=MAX_COUNT, rich_help_panel=KR)
    ] = 50,
    kr_revive_share: Annotated[
        float, typer.Option(help="Share of active units on trial.", min=0, max=1, rich_help_panel=KR)
    ] = 0.25,
    kr_probation: Annotated[int, typer.Option(help="Steps on trial.", min=0, max=MAX_COUNT, rich_help_panel=KR)] = 25,
    kr_hysteresis: Annotated[float, typer.Option(help="A kill's margin.", min=0, max=1, rich_help_panel=KR)] = 0.10,
    kr_on_kill: Annotated[
        OnKill, typer.Option(help="What a killed unit does at first: fade, bypass or hold_forward.", rich_help_panel=KR)
    ] = OnKill.fade,
    kr_cost_aware: Annotated[bool, typer.Option(help="Rank by score per cost.", rich_help_panel=KR)] = True,
    kr_spread: Annotated[
        bool, typer.Option(help="Keep active units apart along the depth.", rich_help_panel=KR)
    ] = True,
    pin: Annotated[str, typer.Option(help="Units never killed: blocks 0,3,26-29.", rich_help_panel=KR)] = "",
    static_units: Annotated[str, typer.Option(help="The units of --kr-score static.", rich_help_panel=KR)] = "",
) -> None:
    """Fine-tune: data and adapters here, frozen blocks on the server.

    Data is JSONL, one example a line: {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...};
    or CSV with --columns. Loss counts on assistant turns, on the completion, or on the whole text. The adapter
    is saved in PEFT's format in --out, every --save-every steps and at the end.

    Example:  dlora-edge train --bundle build/smollm2 --server ws://127.0.0.1:8765 --data chat.jsonl --out my-adapter
    """
    options = locals()
    from dlora.edge.run.report import Reporter
    from dlora.edge.run.run_file import RunSettings

    from .train import run_train

    reporter = Reporter(json_output=json_output)
    settings = RunSettings.of(options)
    reporter.finish(run_train(settings, resume=resume, reporter=reporter))


@app.command(cls=PanelledCommand)
def resume(
    directory: Annotated[Path, typer.Argument(help="The --out of a run.")],
    steps: Annotated[
        int | None, typer.Option(help="Make a finished run longer: its steps in all.", min=1, max=MAX_COUNT)
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="The same as passes over the data.", min=0.0)] = None,
    patience: Annotated[
        int | None, typer.Option(help="End after so many evaluations in a row that are no better.", min=1)
    ] = None,
    keep: Annotated[Keep | None, typer.Option(help="Which adapter to save in the end: the last or the best.")] = None,
    server: Annotated[str | None, typer.Option(help="Another server than before.")] = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    client_cert: ClientCertOption = None,
    client_key: ClientKeyOption = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads.", min=0, max=MAX_THREADS)] = None,
    max_retry_s: Annotated[
        float | None, typer.Option(help="Seconds that the server may be away; for ever by default.", min=0)
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Go on with a run where it stopped, with the settings that it began with (run.json in its directory).

    A finished run can be made longer: with --steps or --epochs, the steps that come on top are a run of their own that
    begins with the weights and AdamW's state of the old one; schedules, and Kill and Revive, begin anew.

    Example:  dlora-edge resume my-adapter --steps 400
    """
    from dlora.edge.run.report import Reporter

    from .train import run_train, settings_of_run

    reporter = Reporter(json_output=json_output)
    changes = {
        "steps": steps, "epochs": epochs, "patience": patience, "keep": keep, "server": server,
        "token_file": token_file, "ca": ca, "client_cert": client_cert, "client_key": client_key, "threads": threads,
        "max_retry_s": max_retry_s,
    }  # fmt: skip
    settings = settings_of_run(directory, changes)
    reporter.finish(run_train(settings, resume=True, reporter=reporter))


@app.command(cls=PanelledCommand)
def evaluate(
    bundle: BundleOption,
    server: ServerOption,
    data: Annotated[Path, typer.Option(help="Data to evaluate on, as for train.")],
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter; none: the base model.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    max_length: MaxLengthOption = None,
    too_long: TooLongOption = TooLong.error,
    columns: ColumnsOption = None,
    wire_dtype: Annotated[WireDtype, typer.Option(help="Precision on the wire: fp16 or fp32.")] = WireDtype.fp16,
    threads: ThreadsOption = 0,
    engine: EngineOption = EngineChoice.auto,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    client_cert: ClientCertOption = None,
    client_key: ClientKeyOption = None,
    insecure: InsecureOption = False,
    max_retry_s: MaxRetryOption = None,
    json_output: JsonOption = False,
) -> None:
    """Loss and accuracy of an adapter, or of the base model, on held-out data."""
    from dataclasses import asdict

    from dlora.edge.data.loading import Reading, load_datasets, usable_length
    from dlora.edge.data.rows import parse_columns
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.run.report import Reporter

    reporter = Reporter(json_output=json_output)
    credentials = load_credentials(token_file, ca, client_cert, client_key, insecure)
    opened = Bundle.open(bundle)
    fields = parse_columns(columns) if columns else None
    longest = usable_length(max_length, opened.manifest)
    with reporter.reading() as on_tick:
        (dataset,) = load_datasets(Reading(opened, [data], fields, longest, too_long.value), on_tick)
    from dlora.edge.model.evaluation import evaluate as run_evaluation

    with (
        _open_model(opened, server, adapter, wire_dtype, threads, engine, credentials, max_retry_s) as model,
        reporter.evaluating("", len(dataset)) as advance,
    ):
        result = run_evaluation(model, dataset, batch_size, lambda done, _: advance(done))
    reporter.finish(asdict(result))


@app.command(cls=PanelledCommand)
def generate(
    bundle: BundleOption,
    server: ServerOption,
    prompt: Annotated[str, typer.Option(help="What to say to the model; a user turn where it has a chat template.")],
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter; none: the base model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    wire_dtype: Annotated[WireDtype, typer.Option(help="Precision on the wire: fp16 or fp32.")] = WireDtype.fp16,
    threads: ThreadsOption = 0,
    engine: EngineOption = EngineChoice.auto,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    client_cert: ClientCertOption = None,
    client_key: ClientKeyOption = None,
    insecure: InsecureOption = False,
    max_retry_s: MaxRetryOption = None,
    json_output: JsonOption = False,
) -> None:
    """Answer a prompt, greedily. The whole prefix is sent for every token: slow, and for a look only."""
    from dlora.edge.data.prompt import prompt_tokenizer
    from dlora.edge.engine.bundle import Bundle

    credentials = load_credentials(token_file, ca, client_cert, client_key, insecure)
    opened = Bundle.open(bundle)
    with prompt_tokenizer(opened) as tokenizer:
        from dlora.edge.model.use import generate_greedily

        with _open_model(opened, server, adapter, wire_dtype, threads, engine, credentials, max_retry_s) as model:
            answer = generate_greedily(model, tokenizer, prompt, max_new_tokens)
    print(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) if json_output else answer)


@app.command(cls=PanelledCommand)
def selftest(
    bundle: BundleOption,
    threads: ThreadsOption = 0,
    engine: Annotated[
        EnginesChoice, typer.Option(help="Which to try; all: every one that bundle and device have, side by side.")
    ] = EnginesChoice.all,
    json_output: JsonOption = False,
) -> None:
    """Run every graph of a bundle on its golden vectors: is this device right, and how fast?"""
    from dlora.edge.engine.bundle import Bundle

    from .selftest import run_selftest, show

    report = run_selftest(Bundle.open(bundle), threads, engine.value)
    _print(report, json_output, show)
    if not report["passed"]:
        raise typer.Exit(1)


@app.command(cls=PanelledCommand)
def info(
    path: Annotated[Path, typer.Argument(help="A bundle, an adapter or the --out of a run.")],
    json_output: JsonOption = False,
) -> None:
    """Say what a bundle or an adapter is."""
    from .info import describe, show

    _print(describe(path), json_output, show)


@app.command(cls=PanelledCommand)
def doctor(
    bundle: Annotated[Path | None, typer.Option(help="Also check this bundle, and what it takes.")] = None,
    server: Annotated[str | None, typer.Option(help="Also try this server.")] = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    client_cert: ClientCertOption = None,
    client_key: ClientKeyOption = None,
    insecure: InsecureOption = False,
    json_output: JsonOption = False,
) -> None:
    """Check this device: versions, memory, engine, bundle, server; and say what to do about each problem."""
    from .doctor import examine, show

    credentials = load_credentials(token_file, ca, client_cert, client_key, insecure)
    report = examine(bundle, server, credentials)
    _print(report, json_output, show)
    if not report["ok"]:
        raise typer.Exit(1)


def load_credentials(
    token_file: Path | None, ca: Path | None, client_cert: Path | None, client_key: Path | None, insecure: bool
) -> Credentials:
    """What the options and ``DLORA_TOKEN`` say; warns on stderr where others can read the token."""
    from dlora.edge.wire.credentials import Credentials

    return Credentials.load(
        token_file, ca=ca, client_cert=client_cert, client_key=client_key, insecure=insecure, warn=_warn
    )


def _open_model(
    bundle: Bundle,
    server: str,
    adapter: Path | None,
    wire_dtype: WireDtype,
    threads: int,
    engine: EngineChoice,
    credentials: Credentials,
    max_retry_s: float | None,
) -> AbstractContextManager[SplitModel]:
    from dlora.edge.model.use import open_model
    from dlora.edge.wire.dialing import Dialing, Retry
    from dlora.edge.wire.identity import load_device_id

    retry = Retry(max_s=max_retry_s, at_start=bool(max_retry_s))
    dialing = Dialing(credentials, load_device_id(warn=_warn), retry, say=_warn)
    return open_model(
        bundle, server, adapter, wire_dtype=wire_dtype.value, threads=threads, engine=engine.value, dialing=dialing
    )


def _warn(line: str) -> None:
    from dlora.edge.run.report import Reporter

    Reporter().warn(line)


def _print(report: dict[str, Any], json_output: bool, show: Any) -> None:
    if json_output:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        show(report)
