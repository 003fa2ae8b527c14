"""``dlora-edge train`` and ``dlora-edge resume``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlora.edge.choices import Keep, ModeChoice, OnWorse
from dlora.edge.run import pause
from dlora.edge.training.schedule import ScheduleName
from dlora.protocol.choices import Adapt, Basis, KindChoice, OnKill, ScoreName, UnitKind
from dlora.protocol.limits import MAX_RANK, MAX_STEPS, MAX_THREADS

from .config_file import ConfigOption, WriteConfigOption
from .help_panels import KR
from .options import (
    BatchSizeOption,
    BundleOption,
    CacheKeyOption,
    CaOption,
    ClientCertOption,
    ClientKeyOption,
    ColumnsOption,
    EngineOption,
    EpochsOption,
    EvalDataOption,
    GradAccumOption,
    InsecureOption,
    JsonOption,
    MaxLengthOption,
    MaxRetryOption,
    MemoryOption,
    OptionalServerOption,
    SendOption,
    SplitOption,
    StepsOption,
    ThreadsOption,
    TokenFileOption,
    TooLongOption,
    TrainOnOption,
)
from .recording import RecordOption

MAX_SEED = 2**32 - 1  # the wire takes no more


# Long, and with many parameters: each is an option, with its default and its help beside it.
def train(
    context: typer.Context,
    bundle: BundleOption,
    data: Annotated[
        Path,
        typer.Option(
            help="Training data: a .jsonl, .json, .csv, .tsv, .parquet, .txt or .md file, or a directory of them. "
            "dlora-edge data shows what is learnt of it."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the PEFT adapter, checkpoints and metrics go.")],
    server: OptionalServerOption = None,
    mode: Annotated[
        ModeChoice,
        typer.Option(
            help="Where the model's blocks run. split: all on the server, which exchanges with the adapters at every "
            "step. trunk: the last ones here, with LoRA in them; the server runs the others, once for each example, "
            "and training then needs no server. local: all here, and no server. auto: what dlora-edge plan recommends.",
        ),
    ] = "split",
    memory: MemoryOption = None,
    device_blocks: Annotated[
        int | None,
        typer.Option(
            help="How many of the last blocks run here; by default all that the bundle has.",
            min=1,
        ),
    ] = None,
    cache_mb: Annotated[
        float | None,
        typer.Option(
            help="With --mode trunk or local: disk for what the server gave and for what comes out of killed blocks, "
            "in MB, by default 4000; what does not fit is asked for, or computed, again at each step that needs it.",
            min=0,
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="With --mode trunk: the server runs each text by itself, so that what comes out depends on no other "
            "text. By default it runs several at once, grouped by their order in the data: faster, the same but for "
            "rounding.",
        ),
    ] = False,
    keep_cache: Annotated[
        bool,
        typer.Option(
            "--keep-cache",
            help="Keep what the server gave when the run is done, for a longer one; it can be turned back into text.",
        ),
    ] = False,
    cache_key_file: CacheKeyOption = None,
    eval_data: EvalDataOption = None,
    epochs: EpochsOption = 1.0,
    steps: StepsOption = None,
    batch_size: BatchSizeOption = 4,
    grad_accum: GradAccumOption = 1,
    max_length: MaxLengthOption = None,
    too_long: TooLongOption = "error",
    columns: ColumnsOption = None,
    train_on: TrainOnOption = "answers",
    split: SplitOption = "auto",
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. By default it is found before the first step, from the size of the first update "
            "that does best on the examples of the next steps.",
            min=0.0,
            max=1e3,
        ),
    ] = None,
    schedule: Annotated[
        ScheduleName, typer.Option(help="Learning rate after warm-up: constant, linear or cosine.")
    ] = "linear",
    warmup: Annotated[
        float, typer.Option(help="Warm-up: steps, or a share of them if below 1.", min=0.0, max=MAX_STEPS)
    ] = 0.03,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            help="AdamW's decoupled weight decay; by default 1 for a bottleneck, 0 for other kinds and with "
            "--init-adapter.",
            min=0.0,
            max=1e3,
        ),
    ] = None,
    max_grad_norm: Annotated[float, typer.Option(help="Clip gradients to this norm; 0: never.", min=0.0)] = 1.0,
    kind: Annotated[
        KindChoice | None,
        typer.Option(
            help="bottleneck: a small core on the device, between a frozen A and B on the server: little traffic. "
            "lora: A and B on the device. ffa: B on the device, a frozen A on the server. By default bottleneck, or "
            "what --init-adapter is."
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="By default the bundle's; 96 for a bottleneck.", min=1, max=MAX_RANK)
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="By default the bundle's; the rank for a bottleneck.")
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            help="What gets adapters: names, separated by commas, or all-linear. By default the bundle's; all-linear "
            "for a bottleneck."
        ),
    ] = None,
    blocks: Annotated[
        str,
        typer.Option(
            help="Adapters in these blocks only: 0,3,26-29; spread:8, eight over the upper half; last:4; or all. By "
            "default all; spread:8 for a bottleneck."
        ),
    ] = "",
    adapt: Annotated[
        Adapt | None,
        typer.Option(
            help="Where adapters act: all, or answer: from the beginning of the answer on, so that what comes before "
            "crosses at no block. By default all; answer for a bottleneck, where the prompts have a common end."
        ),
    ] = None,
    basis: Annotated[
        Basis | None,
        typer.Option(
            help="A and B of a bottleneck. data, the default: the directions in which hidden states (A) and gradients "
            "(B) of some of your data vary most; weights: those of the base model's weights; random."
        ),
    ] = None,
    basis_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps whose data --basis data takes: by default 8, and no example twice.", min=1, max=MAX_STEPS
        ),
    ] = None,
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
        int | None,
        typer.Option(
            help="Evaluate every so many steps; 0: before and after. By default five times where that costs less than "
            "a tenth of the run, else before and after; with --keep best or --patience ten times.",
            min=0,
        ),
    ] = None,
    keep: Annotated[
        Keep,
        typer.Option(
            help="Which adapter to save in the end: the last, or the one best on held-out data; auto: the last, and "
            "the best where the last is worse than none."
        ),
    ] = "auto",
    patience: Annotated[
        int | None, typer.Option(help="End after so many evaluations in a row that are no better.", min=1)
    ] = None,
    on_worse: Annotated[
        OnWorse,
        typer.Option(
            help="Where training makes the model worse than it was, by its held-out loss, or without one by its "
            "training loss: say so and go on, or end there, with exit code 14."
        ),
    ] = "warn",
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Write TensorBoard's event files, too, into --out/tensorboard."),
    ] = False,
    wire_dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision on the wire: int8, fp16 or fp32; and others for some roles: int8,embeddings=fp16. By "
            "default fp16; int8 for a bottleneck."
        ),
    ] = None,
    send: SendOption = "embeddings",
    threads: ThreadsOption = 0,
    engine: EngineOption = "auto",
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
    record: RecordOption = None,
    config: ConfigOption = None,
    write_config: WriteConfigOption = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write what device and server did when, in some steps after the third, for chrome://tracing and "
            "ui.perfetto.dev: trace.json.",
        ),
    ] = None,
    profile_steps: Annotated[int, typer.Option(help="How many steps --profile takes.", min=1, max=1000)] = 10,
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
    bytes_per_token: Annotated[
        int | None,
        typer.Option(
            help="In place of --active-fraction: as many units as keep a step of the steady state within so many bytes "
            "a token, up and down together.",
            min=1,
            max=MAX_STEPS,
            rich_help_panel=KR,
        ),
    ] = None,
    kr_score: Annotated[
        ScoreName,
        typer.Option(
            help="Which units are active: static, the same all the time; by what they are ranked by: grad, change, "
            "sensitivity or norm; or random or last, to compare with.",
            rich_help_panel=KR,
        ),
    ] = "static",
    kr_unit: Annotated[UnitKind, typer.Option(help="What is switched.", rich_help_panel=KR)] = "block",
    kr_warmup_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps before the first kill; by default 20, none for a bottleneck.",
            min=0,
            max=MAX_STEPS,
            rich_help_panel=KR,
        ),
    ] = None,
    kr_ramp_fraction: Annotated[
        float | None,
        typer.Option(
            help="Share of steps at which the budget is down; by default 0.25, 0 for a bottleneck.",
            min=0,
            max=1,
            rich_help_panel=KR,
        ),
    ] = None,
    kr_kill_every: Annotated[
        int, typer.Option(help="Steps between kills.", min=1, max=MAX_STEPS, rich_help_panel=KR)
    ] = 25,
    kr_revive_every: Annotated[
        int, typer.Option(help="Steps between revivals; 0: never.", min=0, max=MAX_STEPS, rich_help_panel=KR)
    ] = 50,
    kr_revive_share: Annotated[
        float, typer.Option(help="Share of active units on trial.", min=0, max=1, rich_help_panel=KR)
    ] = 0.25,
    kr_probation: Annotated[int, typer.Option(help="Steps on trial.", min=0, max=MAX_STEPS, rich_help_panel=KR)] = 25,
    kr_hysteresis: Annotated[float, typer.Option(help="A kill's margin.", min=0, max=1, rich_help_panel=KR)] = 0.10,
    kr_on_kill: Annotated[
        OnKill,
        typer.Option(
            help="What becomes of a killed unit's effect: fade or bypass, it ends; hold_forward, it stays, for its "
            "forward traffic, and always with --mode trunk or local; give_to_server, the server gets what it has "
            "learnt and applies it without traffic.",
            rich_help_panel=KR,
        ),
    ] = "fade",
    kr_cost_aware: Annotated[bool, typer.Option(help="Rank by score per cost.", rich_help_panel=KR)] = True,
    kr_spread: Annotated[
        bool, typer.Option(help="Keep active units apart along the depth.", rich_help_panel=KR)
    ] = True,
    pin: Annotated[str, typer.Option(help="Units never killed: blocks 0,3,26-29.", rich_help_panel=KR)] = "",
    static_units: Annotated[
        str,
        typer.Option(help="The units of --kr-score static; by default spread over the upper half.", rich_help_panel=KR),
    ] = "",
) -> None:
    """Fine-tune: data and adapters here, frozen blocks on the server, or the last few, or all, here.

    Data are rows of chat messages, prompt and completion (text or messages), ShareGPT, Alpaca or plain text, in JSON,
    CSV or Parquet; or .txt and .md files, each a text to go on with. Loss counts on assistant turns, on the completion,
    or on the whole text. The adapter is saved in PEFT's format in --out, every --save-every steps and at the end.

    Example:  dlora-edge train --bundle build/smollm2 --server ws://127.0.0.1:8765 --data chat.jsonl --out my-adapter
    """
    options = locals()  # settings of a run have the names of their options
    if write_config is not None:
        from .config_file import save_config

        save_config(write_config, options, context)
        return
    from dlora.edge.run.display import Display
    from dlora.edge.run.run_file import RunSettings

    from .train_settings import run_train

    display = Display(json_output=json_output)
    settings = RunSettings.of(options)
    profiling = None if profile is None else (profile, profile_steps)
    run_train(settings, resume=resume, display=display, memory=memory, record=record, profile=profiling)


def resume(
    directory: Annotated[Path, typer.Argument(help="The --out of a run.")],
    steps: Annotated[
        int | None, typer.Option(help="Make a finished run longer: its steps in all.", min=1, max=MAX_STEPS)
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="The same as passes over the data.", min=0.0)] = None,
    patience: Annotated[
        int | None, typer.Option(help="End after so many evaluations in a row that are no better.", min=1)
    ] = None,
    keep: Annotated[
        Keep | None, typer.Option(help="Which adapter to save in the end, as train has it; else as before.")
    ] = None,
    on_worse: Annotated[
        OnWorse | None, typer.Option(help="Whether a run that makes the model worse ends; else as before.")
    ] = None,
    tensorboard: Annotated[
        bool | None,
        typer.Option("--tensorboard/--no-tensorboard", help="TensorBoard's event files, or none; else as before."),
    ] = None,
    server: Annotated[str | None, typer.Option(help="Another server than before.")] = None,
    cache_mb: Annotated[
        float | None,
        typer.Option(help="With --mode trunk or local: another limit for the hidden states that are kept.", min=0),
    ] = None,
    keep_cache: Annotated[
        bool | None, typer.Option("--keep-cache", help="With --mode trunk: keep what the server gave.")
    ] = None,
    cache_key_file: CacheKeyOption = None,
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
    from dlora.edge.run.display import Display

    from .train_settings import run_train, settings_of_run

    display = Display(json_output=json_output)
    changes = {
        "steps": steps, "epochs": epochs, "patience": patience, "keep": keep, "on_worse": on_worse,
        "server": server,
        "token_file": token_file, "ca": ca, "client_cert": client_cert, "client_key": client_key, "threads": threads,
        "max_retry_s": max_retry_s, "cache_mb": cache_mb, "keep_cache": keep_cache,
        "cache_key_file": cache_key_file, "tensorboard": tensorboard,
    }  # fmt: skip
    settings = settings_of_run(directory, changes)
    run_train(settings, resume=True, display=display)
