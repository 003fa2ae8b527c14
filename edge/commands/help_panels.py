"""How ``--help`` groups the options of commands; what is not named here comes first, the required ones among it."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from typer.core import TyperCommand

KR: Final = "Kill and Revive"
PANELS: Final = {
    "Data": ("eval_data", "split", "train_on", "columns", "max_length", "too_long"),
    "Training": (
        "epochs", "steps", "batch_size", "grad_accum", "lr", "schedule", "warmup", "weight_decay", "max_grad_norm",
        "seed",
    ),
    "Adapters": ("kind", "rank", "alpha", "target_modules", "blocks", "adapt", "basis", "basis_steps", "init_adapter"),
    "Blocks on the device": ("mode", "memory", "device_blocks", "exact", "cache_mb", "keep_cache", "cache_key_file"),
    "Settings in a file": ("config", "write_config"),
    "Saving and resuming": (
        "resume", "save_every", "eval_every", "keep", "patience", "on_worse", "record", "tensorboard", "profile",
        "profile_steps",
    ),
    "Answers": ("answers", "pattern", "choices", "max_new_tokens", "show", "save"),
    "Choice of tokens": ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    "Connection": (
        "token_file", "ca", "client_cert", "client_key", "insecure", "wire_dtype", "send", "max_retry_s",
        "exchange_timeout_s",
    ),
    "This device": ("engine", "threads", "pause_when"),
}  # fmt: skip
# An option that can be said in two ways takes two columns of its panel.
KR_SWITCHES: Final = f"{KR}, on or off"
# Each option has an environment variable beside its name on the command line, but for these.
VARIABLE: Final = "DLORA_EDGE_"
NO_VARIABLES: Final = ("help", "config", "write_config", "version")
METAVARS: Final = {
    "kr_score": "SCORE", "kr_on_kill": "STATE", "schedule": "SHAPE", "engine": "ENGINE", "wire_dtype": "DTYPE",
    "send": "WHAT", "too_long": "ACTION", "kind": "KIND", "basis": "BASIS", "adapt": "WHERE", "pause_when": "RULES",
    "mode": "MODE", "answers": "HOW", "against": "ADAPTER", "train_on": "WHAT", "split": "SHARE",
}  # fmt: skip


class PanelledCommand(TyperCommand):
    """A command whose options are in panels."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        places = {name: panel for panel, names in PANELS.items() for name in names}
        sizes = Counter(places.get(parameter.name or "") for parameter in self.params)
        for parameter in self.params:
            panel = places.get(parameter.name or "")
            if panel and sizes[panel] > 1:
                parameter.rich_help_panel = panel  # type: ignore[attr-defined]
            if parameter.secondary_opts and getattr(parameter, "rich_help_panel", None) == KR:
                parameter.rich_help_panel = KR_SWITCHES  # type: ignore[attr-defined]
            if not parameter.envvar and parameter.name not in NO_VARIABLES and parameter.param_type_name == "option":
                parameter.envvar = f"{VARIABLE}{(parameter.name or '').upper()}"
                parameter.show_envvar = False  # type: ignore[attr-defined]
            if metavar := METAVARS.get(parameter.name or ""):
                parameter.metavar = metavar
        order = (*PANELS, KR, KR_SWITCHES)
        panels = {parameter.name: getattr(parameter, "rich_help_panel", None) for parameter in self.params}
        self.params.sort(key=lambda each: order.index(panels[each.name]) if panels[each.name] in order else -1)
