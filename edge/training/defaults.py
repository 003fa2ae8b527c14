"""What a run's adapters are where its user leaves it open: chosen once, before the first step, and written down.

Figures: docs/log/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from dlora.protocol.choices import ActiveFrom, Basis, KindChoice
from dlora.protocol.groups import GroupSpec
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import ALL_LINEAR, choose_groups, groups_of, names_selecting, target_names


@dataclass(frozen=True)
class KindDefaults:
    """Defaults of one kind.

    Attributes:
        lr: peak learning rate of a loop of one's own; a run finds its own (``first_rate.py``).
        weight_decay: AdamW's, of adapters that begin at zero; it would make one that a run starts from forget.
        basis: what the server makes its part from; None: it makes none.
        basis_steps: how many steps' data a basis of ``data`` is made from.
        r: the rank; None: the bundle's.
        target_modules: None: the bundle's.
        blocks: as ``--blocks`` has them; empty: all.
        active_from: where they act; ``answer`` only on data that has an invocation.
        wire_dtype: how tensors cross, as ``--wire-dtype`` has it.
        warms_up: whether Kill and Revive begins with all units active.
    """

    lr: float
    weight_decay: float = 0.0
    wire_dtype: str = "fp16"
    active_from: ActiveFrom = "start"
    basis: Basis | None = None
    basis_steps: int = 8
    r: int | None = None
    target_modules: str | None = None
    blocks: str = ""
    warms_up: bool = True


DEFAULT_KIND: Final[KindChoice] = "bottleneck"

_NARROWEST: Final = 8

DEFAULTS: Final[dict[KindChoice, KindDefaults]] = {
    "lora": KindDefaults(lr=8e-3),
    "ffa": KindDefaults(lr=3.2e-2),
    "bottleneck": KindDefaults(
        lr=8e-3,
        weight_decay=1.0,
        r=96,
        target_modules=ALL_LINEAR,
        blocks="spread:8",
        active_from="answer",
        basis="data",
        wire_dtype="int8",
        warms_up=False,  # the basis pass says of every unit, once, what a warm-up would
    ),
}


def default_rank(kind: KindChoice, manifest: Manifest, groups: tuple[GroupSpec, ...]) -> int:
    """The rank of a run that names none; a bottleneck is no wider than what it stands in.

    A group that is ``_is_narrow`` does not count: with it the rank is refused, and no other is made useless.
    """
    r = DEFAULTS[kind].r
    if r is None:
        return manifest.defaults.r
    wide = [group for group in groups if not _is_narrow(group)] or groups
    return min(r, *(min(group.in_features, group.out_features) for group in wide))


def default_alpha(kind: KindChoice, manifest: Manifest, rank: int) -> float:
    """The bundle's for LoRA; for a bottleneck, whose A and B are orthonormal, the rank: a scaling of 1."""
    return float(rank) if kind == "bottleneck" else manifest.defaults.lora_alpha


def default_target_modules(
    kind: KindChoice, manifest: Manifest, active_from: ActiveFrom, device_blocks: Collection[int] = ()
) -> tuple[str, ...]:
    """Names, as ``choose_groups`` reads them.

    Left out are groups that are too narrow for a bottleneck (``_is_narrow``), and, of adapters that act on answers,
    modules to which PEFT gives no activated LoRA; where nothing is left then, none of them is left out.

    Args:
        device_blocks: those that are trained on the device, where all linear modules have LoRA; none: not there.
    """
    named = ALL_LINEAR if device_blocks else DEFAULTS[kind].target_modules
    names = manifest.defaults.target_modules if named is None else (named,)
    groups = choose_groups(manifest, names, device_blocks)
    left_out = set(manifest.without_activation) if active_from == "answer" else set()
    if DEFAULTS[kind].r is not None:
        left_out.update(target_names(filter(_is_narrow, groups)))
    all_of_them = set(target_names(groups))
    kept = all_of_them - left_out
    return (
        names_selecting(manifest, groups_of(manifest, kept), device_blocks) if kept and kept != all_of_them else names
    )


def _is_narrow(group: GroupSpec) -> bool:
    """Whether a core would have next to nothing to do there, as beside the gate of a shared expert, which gives one
    number."""
    return min(group.in_features, group.out_features) < _NARROWEST
