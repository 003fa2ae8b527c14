"""How ``--help`` groups the options of commands; what is not named here comes first, the required ones among it."""

from __future__ import annotations

from typing import Any, Final

from typer.core import TyperCommand

KR: Final = "Kill and Revive"
PANELS: Final = {
    "Data": ("eval_data", "columns", "max_length", "too_long"),
    "Training": (
        "epochs", "steps", "batch_size", "grad_accum", "lr", "schedule", "warmup", "weight_decay", "max_grad_norm",
        "rank", "alpha", "init_adapter", "seed",
    ),
    "Saving and resuming": ("resume", "save_every", "eval_every"),
    "Connection": (
        "token_file", "ca", "client_cert", "client_key", "insecure", "wire_dtype", "max_retry_s", "exchange_timeout_s",
    ),
    "This device": ("engine", "threads", "pause_when"),
}  # fmt: skip
# An option that can be said in two ways takes two columns of its panel.
KR_SWITCHES: Final = f"{KR}, on or off"
METAVARS: Final = {
    "kr_score": "SCORE", "kr_on_kill": "STATE", "schedule": "SHAPE", "engine": "ENGINE", "wire_dtype": "DTYPE",
    "too_long": "ACTION", "pause_when": "RULES",
}  # fmt: skip


class PanelledCommand(TyperCommand):
    """A command whose options are in panels."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        places = {name: panel for panel, names in PANELS.items() for name in names}
        for parameter in self.params:
            if panel := places.get(parameter.name or ""):
                parameter.rich_help_panel = panel  # type: ignore[attr-defined]
            if parameter.secondary_opts:
                parameter.rich_help_panel = KR_SWITCHES  # type: ignore[attr-defined]
            if metavar := METAVARS.get(parameter.name or ""):
                parameter.metavar = metavar
        order = [None, *PANELS, KR, KR_SWITCHES]
        self.params.sort(key=lambda parameter: order.index(getattr(parameter, "rich_help_panel", None)))
