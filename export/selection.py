"""Which modules get an adapter: the user's ``target_modules``, read as PEFT reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS

from dlora.cloud.base_model import BaseModel
from dlora.protocol.errors import ExportError

ALL_LINEAR: Final = "all-linear"


def default_target_modules(base: BaseModel) -> tuple[str, ...]:
    """PEFT's own choice for the architecture. Raises ``ExportError`` where it has none."""
    found = PEFT_DEFAULTS.get(base.architecture)
    if not isinstance(found, list):
        raise ExportError(
            f"PEFT has no default target modules for {base.architecture}; give --target-modules with some of: "
            f"{', '.join(_last_names(base.targets))} (or all-linear)"
        )
    return tuple(found)


def select_targets(base: BaseModel, target_modules: Sequence[str]) -> tuple[str, ...]:
    """Full names of the target modules, in execution order.

    A name selects the modules that it is, or that end in ``.`` and it; ``all-linear`` all that can be targets.
    Raises ``ExportError`` for a name that selects nothing, or a module that cannot be a target.
    """
    if tuple(target_modules) == (ALL_LINEAR,):
        if base.refused:
            name, reason = next(iter(base.refused.items()))
            raise ExportError(f"all-linear includes {name}, which cannot be a target module: it {reason}")
        return tuple(base.targets)
    everything = [name for name, _ in base.model.named_modules()]
    chosen: set[str] = set()
    for wanted in target_modules:
        matches = [name for name in everything if _matches(name, wanted)]
        if not matches:
            raise ExportError(
                f"{base.name} has no module {wanted!r}; target modules can be: {', '.join(_last_names(base.targets))}"
            )
        chosen.update(matches)
    # Asking for the groups names the first module that cannot be a target, and why.
    base.groups(sorted(chosen))
    return tuple(name for name in base.targets if name in chosen)


def peft_target_modules(base: BaseModel, target_modules: Sequence[str], selected: Sequence[str]) -> tuple[str, ...]:
    """What to write into the adapter's config: what the user said, but ``all-linear`` spelled out.

    PEFT's ``all-linear`` also takes linear modules outside the blocks (OPT's ``project_in``), which no device
    can train here.
    """
    if tuple(target_modules) != (ALL_LINEAR,):
        return tuple(target_modules)
    short = _last_names(selected)
    names = [name for name, _ in base.model.named_modules()]
    matched = {name for name in names if any(_matches(name, word) for word in short)}
    return tuple(short) if matched == set(selected) else tuple(selected)


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _last_names(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
