"""Which modules get an adapter: the user's ``target_modules``, read as PEFT reads them, or a default."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from peft import LoraConfig, inject_adapter_in_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from torch import nn

from dlora.cloud.model.base_model import BaseModel, quiet
from dlora.protocol.errors import ExportError
from dlora.protocol.targets import ALL_LINEAR

# For MPT, PEFT's forward is one of its own, in which no adapter is ever activated.
_PEFT_IGNORES_INVOCATION: Final = ("mpt",)


@dataclass(frozen=True)
class Selection:
    """The target modules that training of LoRA with a bundle has by default.

    Attributes:
        trainable: full names of all modules that can be targets, in execution order.
        names: those of them that were selected.
        target_modules: what to write into the adapter's config, which there selects the same.
        notes: lines for the user on what was chosen or left out without being asked.
    """

    trainable: tuple[str, ...]
    names: tuple[str, ...]
    target_modules: tuple[str, ...]
    notes: tuple[str, ...] = ()


def select_targets(base: BaseModel, target_modules: Sequence[str] | None) -> Selection:
    """The target modules that the user asked for; without any, the default of the architecture.

    A name selects the modules that it is, or that end in ``.`` and it; ``all-linear`` all that can be targets.
    Raises ``ExportError`` for a name that selects nothing, or a module that cannot be a target.
    """
    refused = {**base.refused, **_refused_by_peft(base)}
    trainable = tuple(name for name in base.targets if name not in refused)
    if not trainable:
        name, reason = next(iter(refused.items()))
        raise ExportError(f"no module of {base.name} can be a target module: {name} {reason}")
    if target_modules is None:
        return _default(base, trainable)
    if tuple(target_modules) == (ALL_LINEAR,):
        return Selection(trainable, trainable, _shortest_names(base, trainable), _left_out_note(refused))
    for wanted in target_modules:
        if not _matching(base, [wanted]):
            raise ExportError(f"{base.name} has no module {wanted!r}; {_choices_text(base, trainable)}")
    chosen = _matching(base, target_modules)
    if wrong := sorted(chosen.difference(trainable)):
        reason = refused.get(wrong[0], "is not a linear module of a block")
        choices = _choices_text(base, trainable)
        raise ExportError(f"{wrong[0]} cannot be a target module of {base.name}: it {reason}; {choices}")
    return Selection(trainable, tuple(name for name in trainable if name in chosen), tuple(target_modules))


def can_be_activated(base: BaseModel, name: str) -> bool:
    """Whether PEFT gives a target module an activated LoRA, whose deltas begin at an invocation."""
    return base.architecture not in _PEFT_IGNORES_INVOCATION and base.targets[name].sees_sequences


def _default(base: BaseModel, trainable: tuple[str, ...]) -> Selection:
    """PEFT's choice for the architecture, where it has one and all of it can be trained here; else dlora's own."""
    peft_default = PEFT_DEFAULTS.get(base.architecture)
    reason = f"PEFT has none for {base.architecture}"
    if isinstance(peft_default, list):
        matches = _matching(base, peft_default)
        if matches and matches.issubset(trainable):
            return Selection(trainable, tuple(name for name in trainable if name in matches), tuple(peft_default))
        reason = f"not all of PEFT's for {base.architecture} can be trained here"
    chosen = [name for name in trainable if _attention_part(name) & {"q", "v"}]
    # Mamba's blocks begin with one projection, which stands where attention has its own.
    chosen = chosen or [name for name in trainable if name.endswith(".in_proj")]
    if not chosen:
        raise ExportError(
            f"{base.name} ({base.architecture}) has no default target modules: {reason}, and dlora finds no attention; "
            f"give --target-modules: {_choices_text(base, trainable)}"
        )
    short_names = _shortest_names(base, chosen)
    shown = short_names if len(short_names) < len(chosen) else _last_parts(chosen)
    note = f"target modules are {', '.join(shown)}, the default of dlora: {reason}"
    return Selection(trainable, tuple(chosen), short_names, (note,))


def _attention_part(name: str) -> set[str]:
    """What attention takes from a module, by its name: ``{"q"}`` from ``q_proj``, q, k and v from ``Wqkv``.

    Where the last part of the name says nothing, as in Moshi's ``q_proj.linear``, the one before it may.
    """
    *_, parent, last = name.split(".")
    return _attention_parts_in(last) or _attention_parts_in(parent)


def _attention_parts_in(word: str) -> set[str]:
    if word == "c_attn":  # of GPT-2 and its children
        return {"q", "k", "v"}
    found: set[str] = set()
    for part in word.lower().split("_"):
        letters = {"query": "q", "key": "k", "value": "v"}.get(part, part.removeprefix("w"))
        if set(letters) <= set("qkvz"):  # z is the gate that Qwen3-Next fuses with them
            found.update(letters)
    return found - {"z"}


def _refused_by_peft(base: BaseModel) -> dict[str, str]:
    """Target modules that PEFT gives no LoRA in this architecture, and why.

    It refuses ``out_proj`` of Mamba, and in some mixtures of experts it takes ``gate_proj``, ``up_proj`` and
    ``down_proj`` for those of the experts, whatever else has these names. PEFT itself is asked, with a lone module of
    each name under the base model's config.
    """
    refused: set[str] = set()
    for word in _last_parts(base.targets):
        alone = nn.Module()
        alone.config = base.model.config  # type: ignore[assignment]
        alone.add_module(word, nn.Linear(1, 1))
        try:
            with quiet():
                inject_adapter_in_model(LoraConfig(r=1, target_modules=[word]), alone)
        except ValueError:
            refused.add(word)
    reason = f"gets no LoRA from PEFT in {base.architecture} models"
    return {name: reason for name in base.targets if name.rpartition(".")[2] in refused}


def _left_out_note(refused: dict[str, str]) -> tuple[str, ...]:
    """The note on what ``all-linear`` leaves out: how many modules, and one of them for each reason."""
    if not refused:
        return ()
    examples = {reason: name for name, reason in reversed(refused.items())}
    reasons = "; ".join(f"{name} {reason}" for reason, name in reversed(examples.items()))
    count = f"{len(refused)} module{'s' if len(refused) > 1 else ''}"
    return (f"all-linear leaves out {count}: {reasons}",)


def _choices_text(base: BaseModel, trainable: Collection[str]) -> str:
    """What ``--target-modules`` takes here, without names that would be refused."""
    words = [word for word in _last_parts(trainable) if _matching(base, [word]).issubset(trainable)]
    return f"target modules can be: {', '.join([*words, ALL_LINEAR])}"


def _shortest_names(base: BaseModel, names: Collection[str]) -> tuple[str, ...]:
    """Names for an adapter's config that select exactly these modules in PEFT: as short as can be.

    PEFT's ``all-linear`` would also take linear modules outside the blocks (OPT's ``project_in``), and a short name
    the modules of another part of the model (its vision tower), which no device can train here.
    """
    for parts in (1, 2):
        short = _last_parts(names, parts)
        if _matching(base, short) == set(names):
            return tuple(short)
    return tuple(names)


def _matching(base: BaseModel, words: Iterable[str]) -> set[str]:
    """The modules that PEFT takes for these names."""
    words = tuple(words)
    endings = tuple(f".{word}" for word in words)
    return {name for name, _ in base.model.named_modules() if name in words or name.endswith(endings)}


def _last_parts(names: Iterable[str], parts: int = 1) -> list[str]:
    return sorted({".".join(name.split(".")[-parts:]) for name in names})
