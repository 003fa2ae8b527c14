"""What adapters a run has: its options, completed once with what they leave open, before anything is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from dlora.edge.data.invocation import find_invocation, uninvoked, uninvoked_line
from dlora.edge.run.run_file import RunSettings
from dlora.edge.training.defaults import (
    DEFAULT_KIND,
    DEFAULTS,
    default_alpha,
    default_rank,
    default_target_modules,
)
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.choices import Adapt, KindChoice
from dlora.protocol.errors import UsageError
from dlora.protocol.groups import GroupSpec
from dlora.protocol.kill_revive import MAX_UNITS, KillReviveConfig
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import (
    choose_groups,
    groups_of,
    last_blocks,
    names_selecting,
    number_ranges,
    spread_blocks,
    target_names,
)

if TYPE_CHECKING:
    from dlora.edge.adapters.peft import LoadedAdapter
    from dlora.edge.data.examples import Dataset

_COUNTED: Final = {"spread": spread_blocks, "last": last_blocks}


def choose_adapters(settings: RunSettings, manifest: Manifest, init: LoadedAdapter | None) -> RunSettings:
    """``settings`` with kind, rank, alpha, target modules, blocks and weight decay, as ``run.json`` keeps them.

    What is left open is that of ``init``, the adapter to start from, where it is of a kind that starts only from its
    own, or the kind's default. Raises ``UsageError`` for modules or blocks that the bundle does not have.
    """
    parts = init.parts if init is not None else None
    kind: KindChoice = settings.kind or DEFAULT_KIND
    if settings.kind is None and init is not None:
        kind = msgspec.convert("lora" if parts is None else parts.kind, KindChoice)
    defaults = DEFAULTS[kind]
    weight_decay = defaults.weight_decay if init is None else 0.0
    settings = msgspec.structs.replace(
        settings,
        kind=kind,
        weight_decay=weight_decay if settings.weight_decay is None else settings.weight_decay,
        wire_dtype=settings.wire_dtype or defaults.wire_dtype,
        **_schedule(settings, warms_up=defaults.warms_up),
        **_basis(settings, kind, has_one=init is not None),
    )
    names, blocks = target_modules_of(settings), settings.blocks
    if init is not None and parts is not None and parts.kind == kind:
        trained = groups_of(manifest, init.modules)
        own_blocks = {group.block for group in trained}
        names = names or names_selecting(manifest, trained, own_blocks)
        blocks = blocks or number_ranges(own_blocks)
    names = names or default_target_modules(kind, manifest, settings.adapt or defaults.adapt)
    settings = msgspec.structs.replace(settings, target_modules=",".join(names), blocks=blocks or defaults.blocks)
    numbers = parse_blocks(settings.blocks, manifest)
    settings = msgspec.structs.replace(settings, blocks=number_ranges(numbers))
    groups = choose_groups(manifest, target_modules_of(settings), numbers)
    rank = settings.rank
    if rank is None:
        rank = parts.r if parts is not None and parts.kind == kind else default_rank(kind, manifest, groups)
    alpha = default_alpha(kind, manifest, rank) if settings.alpha is None else settings.alpha
    return msgspec.structs.replace(settings, rank=rank, alpha=alpha)


def default_adapters(kind: KindChoice, manifest: Manifest) -> tuple[AdapterSpec, tuple[GroupSpec, ...]]:
    """What a run has that names no more than the kind: what crosses for a group, and its groups."""
    blocks = parse_blocks(DEFAULTS[kind].blocks, manifest)
    groups = choose_groups(manifest, default_target_modules(kind, manifest, DEFAULTS[kind].adapt), blocks)
    return AdapterSpec(kind, default_rank(kind, manifest, groups)), groups


def _schedule(settings: RunSettings, *, warms_up: bool) -> dict[str, Any]:
    """How Kill and Revive begins, where that is left open."""
    usual = KillReviveConfig()
    steps, ramp = (usual.warmup_steps, usual.ramp_fraction) if warms_up else (0, 0.0)
    return {
        "kr_warmup_steps": steps if settings.kr_warmup_steps is None else settings.kr_warmup_steps,
        "kr_ramp_fraction": ramp if settings.kr_ramp_fraction is None else settings.kr_ramp_fraction,
    }


def _basis(settings: RunSettings, kind: KindChoice, *, has_one: bool) -> dict[str, Any]:
    """What the server makes A and B from. Raises ``UsageError`` where it makes none."""
    defaults = DEFAULTS[kind]
    given = {"--basis": settings.basis, "--basis-steps": settings.basis_steps}
    options = " and ".join(option for option, value in given.items() if value is not None)
    if defaults.basis is None or has_one:
        if options:
            why = f"--kind {kind} has no basis" if defaults.basis is None else "--init-adapter has its basis"
            raise UsageError(f"{options}: {why}; leave that out")
        return {}
    basis = settings.basis or defaults.basis
    if basis == "data":
        return {"basis": basis, "basis_steps": settings.basis_steps or defaults.basis_steps}
    if settings.basis_steps is not None:
        raise UsageError(f"--basis-steps: a basis of {basis} takes no data; leave that out")
    return {"basis": basis}


def choose_where_adapters_act(
    settings: RunSettings,
    manifest: Manifest,
    init: LoadedAdapter | None,
    datasets: Sequence[Dataset],
    known: tuple[int, ...],
    say: Callable[[str], None],
) -> tuple[Adapt, tuple[int, ...], list[Dataset]]:
    """What ``--adapt`` is, the invocation, and the data as it is trained on.

    ``settings`` are as ``choose_adapters`` has completed them. The first of ``datasets`` is trained on. ``known`` is
    the invocation of the run that goes on; else none. Raises ``UsageError`` where ``--adapt answer`` was asked for and
    its data have no invocation, or PEFT no activated LoRA for the modules.
    """
    assert settings.kind is not None
    adapt = settings.adapt or DEFAULTS[settings.kind].adapt
    if settings.adapt is None and init is not None:
        adapt = "answer" if init.invocation else "all"
    if adapt == "all":
        return "all", (), list(datasets)
    is_asked_for = settings.adapt is not None or init is not None
    if without := _chosen_without_activation(settings, manifest):
        reason = f"PEFT has no activated LoRA for {without} of this base model"
        if is_asked_for:
            raise UsageError(f"{reason}; leave these out of --target-modules, or take --adapt all")
        say(f"adapters act at all tokens: {reason} (--adapt)")
        return "all", (), list(datasets)
    if datasets[0].facts.is_plain_text:
        reason = f"data of the form {datasets[0].facts.form!r} have no answers"
        if settings.adapt is not None:
            raise UsageError(f"--adapt answer: {reason}; use --adapt all")
        if init is not None:
            raise UsageError(f"--init-adapter acts on answers, and {reason}; give data with prompts")
        say(f"adapters act at all tokens: {reason} (--adapt)")
        return "all", (), list(datasets)
    cut = [dataset.one_answer_each() for dataset in datasets]
    try:
        known = known or (init.invocation if init is not None else ())
        if known and not uninvoked(cut[0], known):
            invocation = known
        else:
            invocation = find_invocation(cut[0], cut[1:])
    except UsageError:
        if is_asked_for:
            raise
        say("adapters act at all tokens: the prompts have no common end that begins the answers (--adapt)")
        return "all", (), list(datasets)
    for dataset in cut[1:]:
        if line := uninvoked_line(dataset, invocation):
            say(line)
    if len(cut[0]) > len(datasets[0]):
        say(f"each answer is an example of its own: {len(cut[0]):,} of {len(datasets[0]):,} conversations")
    if line := _left_out_line(settings, manifest):
        say(line)
    say(
        "adapters act from the beginning of the answer on (activated LoRA): PEFT loads them so, and cannot merge them "
        "into the base model; --adapt all gives some that can be merged"
    )
    return "answer", invocation, cut


def _chosen_without_activation(settings: RunSettings, manifest: Manifest) -> str:
    """The modules that are to have adapters, and to which PEFT gives no activated LoRA: the ends of their names."""
    chosen = _chosen(manifest, target_modules_of(settings), settings.blocks)
    return _ends(chosen.intersection(manifest.without_activation))


def _left_out_line(settings: RunSettings, manifest: Manifest) -> str | None:
    """What to say of modules that get no adapters because PEFT does not activate them; None where there are none."""
    assert settings.kind is not None
    names = target_modules_of(settings)
    if names != default_target_modules(settings.kind, manifest, "answer"):
        return None
    chosen = _chosen(manifest, names, settings.blocks)
    everywhere = _chosen(manifest, default_target_modules(settings.kind, manifest, "all"), settings.blocks)
    left_out = everywhere - chosen
    if not left_out:
        return None
    without = _ends(left_out, chosen)
    return f"PEFT has no activated LoRA for {without} of this base model: these get no adapters (--adapt all)"


def _chosen(manifest: Manifest, names: tuple[str, ...], blocks: str) -> set[str]:
    """The full names of the modules that get adapters."""
    return set(target_names(choose_groups(manifest, names, parse_blocks(blocks, manifest))))


def _ends(names: Iterable[str], others: Iterable[str] = ()) -> str:
    """The last parts of the names, each once, and the one before where it would be one of ``others`` as well."""
    taken = {name.rpartition(".")[2] for name in others}
    ends = {name.rpartition(".")[2]: name for name in names}
    return ", ".join(sorted(".".join(name.split(".")[-2:]) if end in taken else end for end, name in ends.items()))


def target_modules_of(settings: RunSettings) -> tuple[str, ...]:
    """The names that a user gave; none: none were given. Raises ``UsageError`` where there is only nothing."""
    names = [name.strip() for name in (settings.target_modules or "").split(",")]
    given = tuple(dict.fromkeys(filter(None, names)))
    if settings.target_modules is not None and not given:
        raise UsageError("--target-modules is empty; name some, separated by commas, or leave it out")
    return given


def parse_blocks(text: str, manifest: Manifest) -> tuple[int, ...]:
    """The blocks that ``--blocks`` names; none: all. Raises ``UsageError``."""
    if text.strip() == "all":
        return tuple(sorted({group.block for group in manifest.groups}))
    counted = re.fullmatch(r"\s*(spread|last):([1-9][0-9]{0,4})\s*", text)
    if counted is not None:
        return _COUNTED[counted[1]](manifest, int(counted[2]))
    return parse_numbers(text, "--blocks", "blocks")


def parse_numbers(text: str, option: str, what: str) -> tuple[int, ...]:
    """``"0,3,26-29"`` to ``(0, 3, 26, 27, 28, 29)``; ``what`` they number is for the ``UsageError`` that it raises."""
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        last = last if dash else first
        # Nine digits are enough; int() refuses thousands.
        is_number = all(each.isdecimal() and len(each) < 10 for each in (first, last))
        if not (is_number and int(first) <= int(last) < MAX_UNITS):
            raise UsageError(f"{option} {text[:80]!r}: write {what} as 0,3,26-29")
        found.update(range(int(first), int(last) + 1))
    if text and not found:
        raise UsageError(f"{option} {text[:80]!r}: write {what} as 0,3,26-29, or leave it out")
    return tuple(sorted(found))
