"""What is wrong with a command line, in our words: of typer's errors, by their attributes, for it is imported late."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from enum import Enum
from typing import Any, Final, Literal, get_args, get_origin

OTHER_NAMES: Final = {
    "--lr": ("learning-rate",),
    "--rank": ("lora-r", "lora-rank", "r"),
    "--alpha": ("lora-alpha",),
    "--target-modules": ("lora-target-modules", "lora-modules", "lora-target"),
    "--blocks": ("layers-to-transform", "lora-layers", "num-layers"),
    "--steps": ("max-steps", "iters", "num-train-steps"),
    "--epochs": ("num-epochs", "num-train-epochs"),
    "--batch-size": (
        "per-device-train-batch-size", "per-device-eval-batch-size", "micro-batch-size", "train-batch-size",
    ),
    "--grad-accum": ("gradient-accumulation-steps", "gradient-accumulation", "grad-accumulation-steps"),
    "--max-grad-norm": ("gradient-clipping", "max-gradient-norm", "grad-clip"),
    "--max-length": ("max-seq-length", "max-seq-len", "sequence-len", "cutoff-len", "block-size"),
    "--warmup": ("warmup-steps", "warmup-ratio"),
    "--schedule": ("lr-scheduler-type", "lr-scheduler", "scheduler"),
    "--out": ("output-dir", "output", "out-dir", "adapter-path", "save-dir"),
    "--bundle": ("model", "model-name-or-path", "model-name", "base-model", "pretrained-model-name-or-path"),
    "--data": ("dataset", "dataset-name", "datasets", "train-file", "train-data"),
    "--eval": ("eval-dataset", "eval-data", "eval-file", "validation-file", "valid-data"),
    "--hold-out": ("val-set-size", "validation-split", "validation-split-percentage", "val-size"),
    "--save-every": ("save-steps",),
    "--eval-every": ("eval-steps", "steps-per-eval"),
    "--keep best": ("load-best-model-at-end",),
    "--patience": ("early-stopping-patience",),
    "--resume": ("resume-from-checkpoint",),
    "--train-on": ("train-on-inputs", "assistant-only-loss", "completion-only-loss", "mask-prompt"),
    "--init-adapter": ("lora-model-dir", "resume-adapter-file"),
    "--adapter": ("peft-model", "lora-path", "adapter-name-or-path", "lora"),
    "--max-new-tokens": ("max-tokens", "num-predict"),
    "--token-file": ("token", "hf-token"),
    "--server": ("url", "server-url", "address"),
}  # fmt: skip
"""What PEFT, transformers, TRL, axolotl, Llama-Factory and mlx-lm call our options, without their dashes."""

FORMER: Final = {
    "--mode": "say --device-blocks 0, N, all or auto",
    "--split": "it is --hold-out now",
    "--adapt": "it is --active-from now: start or answer",
    "--exact": "leave it out: the same texts give the same bits each time",
    "--basis-steps": "say --set adapter.basis_steps=N",
    "--exchange-timeout-s": "say --set server.exchange_timeout_s=X",
    "--kr-warmup-steps": "say --set kill_revive.warmup_steps=N",
    "--kr-ramp-fraction": "say --set kill_revive.ramp_fraction=X",
    "--kr-kill-every": "say --set kill_revive.kill_every=N",
    "--kr-revive-every": "say --set kill_revive.revive_every=N",
    "--kr-probation": "say --set kill_revive.probation=N",
    "--kr-revive-share": "leave it out: a quarter of the active units are on trial",
    "--kr-hysteresis": "leave it out: a unit must lose by a tenth",
    "--kr-cost-aware": "leave it out: units are ranked by score per cost",
    "--kr-spread": "leave it out: active units are kept apart",
    "--try": "leave it out: benchmarks/audit.py attacks defences",
}
"""Options of former versions, and what to say in place of them."""

_OURS: Final = {f"--{other}": ours for ours, others in OTHER_NAMES.items() for other in others}
_VALUE: Final = re.compile(r"(.+?) is not (?:a valid|in the range|one of)", re.S)


def meant_option(word: str, options: Collection[str]) -> str:
    """Which of ``options`` somebody meant who wrote ``word``, as the end of a sentence; empty where none is like it."""
    word = word.replace("_", "-")
    known = _OURS.get(word, word)
    if known.split()[0] in options:
        return f"; you mean {known}"
    near = difflib.get_close_matches(word, options, 1)
    return f"; is it {near[0]}?" if near else ""


def usage_words(error: Any) -> str:
    """One line about an error of typer's."""
    help_of = "" if error.ctx is None else f"; {error.ctx.command_path} --help says more"
    words: dict[str, Any] = {
        "NoSuchOption": _unknown_option, "MissingParameter": _missing, "BadParameter": _bad_value,
        "BadOptionUsage": _bad_option,
    }  # fmt: skip
    made = words.get(type(error).__name__, _other)(error)
    return str(made) if ";" in made else f"{made}{help_of}"


def _unknown_option(error: Any) -> str:
    options: list[str] = []
    arguments: list[str] = []
    for parameter in error.ctx.command.params if error.ctx is not None else ():
        is_option = parameter.param_type_name == "option"
        (options if is_option else arguments).extend((*parameter.opts, *parameter.secondary_opts))
    name = str(error.option_name)
    if name.removeprefix("--") in arguments:
        return f"no option {name}; leave that word out, and write only what comes after it"
    if name in FORMER:
        return f"no option {name}: {FORMER[name]}"
    return f"no option {name}{meant_option(name, options)}"


def _missing(error: Any) -> str:
    return f"{_name(error)} is missing"


def _bad_option(error: Any) -> str:
    takes_none = "not take" in error.message
    return f"{error.option_name} {'takes no value after it' if takes_none else 'needs a value after it'}"


def _bad_value(error: Any) -> str:
    name, given = _name(error), _given(error)
    if given is None:
        return f"{name}: {error.message.rstrip('.')}"
    kind = _kind(error.param)
    choices = get_args(kind) if get_origin(kind) is Literal else getattr(kind, "choices", None)
    if choices is None and isinstance(kind, type) and issubclass(kind, Enum):
        choices = tuple(kind)
    if choices is not None:
        words = ", ".join(str(getattr(each, "value", each)) for each in choices)
        return f"{name} {given} is not understood; write one of: {words}"
    for what, kinds in (("a whole number", (int, "integer")), ("a number", (float, "float"))):
        if kind in kinds or str(getattr(kind, "name", "")).startswith(str(kinds[1])):
            return f"{name} {given} is not understood, or out of range; write {what}{_bounds(error.param)}"
    is_switch = kind is bool or str(getattr(kind, "name", "")) == "boolean"
    return f"{name} {given} is not understood; write {'true or false' if is_switch else 'another value'}"


def _given(error: Any) -> str | None:
    """What somebody wrote: typer's newer releases keep it in the error's cause, others in its words."""
    if hasattr(error.__cause__, "errors"):
        return str(error.__cause__.errors()[0].get("input"))
    found = _VALUE.match(error.message)
    return None if found is None else found[1].strip("'")


def _kind(parameter: Any) -> Any:
    """A parameter's type, Python's own or, in typer's older releases, click's; of a list that of what is in it."""
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    kind = kind if kind is not None else getattr(parameter, "type", None)
    return get_args(kind)[0] if get_origin(kind) is list else kind


def _bounds(parameter: Any) -> str:
    where = parameter if getattr(parameter, "type_descriptor", None) is not None else parameter.type
    least, most = getattr(where, "min", None), getattr(where, "max", None)
    text = "" if least is None else f" from {least:g} on"
    return text if most is None else f"{text.removesuffix(' on')} up to {most:,}"


def _other(error: Any) -> str:
    message = error.format_message().rstrip(".")
    if found := re.search(r"unexpected extra argument(?:s|\(s\))? \((.*)\)", message, re.S):
        return f"there is nothing to take {found[1]!r}: leave it out, or write the option before it"
    if found := re.search(r"No such command '(.*?)'", message, re.S):
        near = difflib.get_close_matches(found[1], getattr(error.ctx.command, "commands", ()), 1)
        return f"no command {found[1]!r}" + (f"; is it {near[0]!r}?" if near else "")
    return str(message)


def _name(error: Any) -> str:
    """The parameter as it is written, and where its value is from if that is not the command line."""
    parameter = error.param
    if parameter is None:
        return str(error.param_hint or "a value")
    if parameter.param_type_name != "option":
        return str(parameter.metavar or parameter.name).upper()
    name = max(parameter.opts, key=len)
    source = error.ctx.get_parameter_source(parameter.name) if error.ctx is not None else None
    if source is not None and source.name == "ENVIRONMENT":
        return f"{name} (from {parameter.envvar})"
    return f"{name} (from --config)" if source is not None and source.name == "DEFAULT_MAP" else str(name)
