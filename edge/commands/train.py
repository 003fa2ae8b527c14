"""``dlora-edge train`` and ``dlora-edge resume``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dlora.edge.settings import Settings

from .options import JsonOption, RecordOption
from .settings_options import takes_settings

if TYPE_CHECKING:
    from dlora.edge.run.display import Display
    from dlora.edge.run.start import Start
    from dlora.edge.run.watcher import RunWatcher
    from dlora.edge.wire.spans import Spans

_SAVING: Final = "Saving and evaluating"
_CHANGEABLE: Final = (
    "steps", "epochs", "server", "token_file", "ca", "client_cert", "client_key", "insecure", "window", "max_retry_s",
    "threads", "engine", "pause_when", "cache_mb", "keep_cache", "cache_key_file", "save_every", "eval_every", "keep",
    "patience", "on_worse", "tensorboard",
)  # fmt: skip
"""What of a run may be otherwise when it goes on."""


@takes_settings(required=("bundle", "data", "out"), has_file=True)
def train(
    settings: Settings,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the last checkpoint in --out.", rich_help_panel=_SAVING, hidden=True),
    ] = False,
    record: RecordOption = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write what device and server did when, in some steps after the third, for chrome://tracing and "
            "ui.perfetto.dev: trace.json.",
            rich_help_panel=_SAVING,
            hidden=True,
        ),
    ] = None,
    profile_steps: Annotated[
        int,
        typer.Option(help="How many steps --profile takes.", min=1, max=1000, rich_help_panel=_SAVING, hidden=True),
    ] = 10,
    json_output: JsonOption = False,
) -> None:
    """Fine-tune: data and adapters here, frozen blocks on the server, or the last few, or all, here.

    Data are rows of chat messages, prompt and completion, ShareGPT, Alpaca or plain text, in JSON, CSV or Parquet; or
    .txt and .md files. Loss counts on assistant turns, on the completion, or on the whole text. The adapter is saved in
    PEFT's format in --out, at the end and on the way.

    Example:  dlora-edge train --bundle build/smollm2 --server ws://127.0.0.1:8765 --data chat.jsonl --out my-adapter
    """
    from dlora.edge.run.display import Display
    from dlora.edge.run.start import Start, start_run

    start = Start(resume, record, profile, profile_steps)
    start_run(settings, start, Display(json_output=json_output), _watchers)


@takes_settings(*_CHANGEABLE, is_change=True)
def resume(
    changes: dict[str, Any],
    directory: Annotated[Path, typer.Argument(help="The --out of a run.")],
    json_output: JsonOption = False,
) -> None:
    """Go on with a run where it stopped, with the settings that it began with (run.json in its directory).

    A finished run can be made longer: with --steps or --epochs, the steps that come on top are a run of their own that
    begins with the weights and AdamW's state of the old one; schedules, and Kill and Revive, begin anew.

    Example:  dlora-edge resume my-adapter --steps 400
    """
    from dlora.edge.run.display import Display
    from dlora.edge.run.start import Start, settings_of_run, start_run

    start_run(settings_of_run(directory, changes), Start(resume=True), Display(json_output=json_output), _watchers)


def _watchers(settings: Settings, start: Start, display: Display, spans: Spans) -> list[RunWatcher]:
    from dlora.edge.report.profiler import Profiler
    from dlora.edge.report.tensorboard import TensorboardWriter
    from dlora.edge.report.writer import ReportWriter

    out = settings.saving.out
    assert out is not None
    watchers: list[RunWatcher] = [ReportWriter(out, display.warn)]
    if settings.saving.tensorboard:
        watchers.append(TensorboardWriter(out))
    if start.profile is not None:
        watchers.append(Profiler(start.profile, spans, start.profile_steps))
    return watchers
