"""What adapters a run has: all that its settings leave open, chosen before anything is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from dlora.edge.adapters.peft import LoadedAdapter
from dlora.edge.data.examples import Dataset
from dlora.edge.data.invocation import find_invocation, uninvoked, uninvoked_line
from dlora.edge.settings import Adapter
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.choices import ActiveFrom, KindChoice
from dlora.protocol.errors import UsageError
from dlora.protocol.groups import GroupSpec
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import choose_groups, groups_of, names_selecting, number_ranges, target_names

from .defaults import DEFAULT_KIND, DEFAULTS, default_alpha, default_rank, default_target_modules
from .resolved import ChosenAdapter
from .selection import parse_blocks, target_modules_of


def choose_adapter(
    settings: Adapter, manifest: Manifest, init: LoadedAdapter | None, device_blocks: int = 0
) -> ChosenAdapter:
    """``settings`` with nothing left open, but for whether data have answers that adapters may act on.

    What is open is that of ``init``, the adapter to start from, where it is of a kind that starts only from its own; or
    the kind's default. With blocks on the device LoRA stands beside every linear module of these, where nothing else is
    said. Raises ``UsageError`` for modules or blocks that the bundle does not have, or that cannot be trained there.
    """
    if device_blocks:
        settings = _on_device(settings, manifest, init, device_blocks)
    parts = init.parts if init is not None else None
    kind: KindChoice = settings.kind or DEFAULT_KIND
    if settings.kind is None and init is not None:
        kind = msgspec.convert("lora" if parts is None else parts.kind, KindChoice)
    defaults = DEFAULTS[kind]
    own = parts if parts is not None and parts.kind == kind else None
    names, blocks = target_modules_of(settings.target_modules), settings.blocks
    if init is not None and own is not None:
        trained = groups_of(manifest, init.modules)
        own_blocks = {group.block for group in trained}
        names = names or names_selecting(manifest, trained, own_blocks)
        blocks = blocks or number_ranges(own_blocks)
    active_from = settings.active_from or defaults.active_from
    names = names or default_target_modules(kind, manifest, active_from)
    numbers = parse_blocks(blocks or defaults.blocks, manifest)
    groups = choose_groups(manifest, names, numbers)
    rank = settings.rank or (default_rank(kind, manifest, groups) if own is None else own.r)
    chosen: dict[str, Any] = {
        "kind": kind,
        "rank": rank,
        "alpha": settings.alpha or default_alpha(kind, manifest, rank),
        "target_modules": ",".join(names),
        "blocks": number_ranges(numbers),
        "active_from": settings.active_from or _usual_active_from(init, defaults.active_from),
        **_basis(settings, kind, has_one=init is not None),
    }
    return ChosenAdapter(**{**msgspec.structs.asdict(settings), **chosen})


def _usual_active_from(init: LoadedAdapter | None, of_kind: ActiveFrom) -> ActiveFrom:
    if init is None:
        return of_kind
    return "answer" if init.invocation else "start"


def _on_device(settings: Adapter, manifest: Manifest, init: LoadedAdapter | None, device_blocks: int) -> Adapter:
    if settings.kind not in (None, "lora"):
        raise UsageError(
            f"--kind {settings.kind} cannot be with --device-blocks {device_blocks}: it trains LoRA: leave that out"
        )
    active_from = settings.active_from or _usual_active_from(init, "start")
    spec = manifest.device_blocks
    if active_from == "answer" and spec is not None and spec.without_decode is not None:
        option = "--active-from answer" if settings.active_from else "--init-adapter, which acts on answers,"
        raise UsageError(
            f"{option} cannot be with --device-blocks {device_blocks}: the bundle's blocks cannot go on from earlier "
            f"tokens ({spec.without_decode}); use --device-blocks 0"
        )
    last = manifest.base_model.blocks
    here = range(last - device_blocks, last)
    blocks = parse_blocks(settings.blocks, manifest) if settings.blocks else tuple(here)
    if outside := set(blocks) - set(here):
        raise UsageError(
            f"--blocks: only the blocks on this device can be trained, {number_ranges(here)}, not "
            f"{number_ranges(outside)}; name others, or raise --device-blocks"
        )
    return msgspec.structs.replace(
        settings,
        kind="lora",
        active_from=active_from,
        blocks=number_ranges(blocks),
        target_modules=settings.target_modules
        or ",".join(default_target_modules("lora", manifest, active_from, blocks)),
    )


def _basis(settings: Adapter, kind: KindChoice, *, has_one: bool) -> dict[str, Any]:
    """What the server makes A and B from. Raises ``UsageError`` where it makes none."""
    defaults = DEFAULTS[kind]
    given = {"--basis": settings.basis, "--set adapter.basis_steps": settings.basis_steps}
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
        raise UsageError(f"--set adapter.basis_steps: a basis of {basis} takes no data; leave that out")
    return {"basis": basis}


def choose_where_adapters_act(
    settings: Adapter,
    chosen: ChosenAdapter,
    manifest: Manifest,
    init: LoadedAdapter | None,
    datasets: Sequence[Dataset],
    known: tuple[int, ...],
    say: Callable[[str], None],
    *,
    on_device: bool,
) -> tuple[ActiveFrom, tuple[int, ...], list[Dataset]]:
    """What ``--active-from`` is, the invocation, and the data as it is trained on.

    The first of ``datasets`` is trained on. Raises ``UsageError`` where ``--active-from answer`` was asked for and its
    data have no invocation, or PEFT no activated LoRA for the modules.

    Args:
        chosen: of ``settings``, by ``choose_adapter``.
        known: the invocation of the run that goes on; else none.
        on_device: whether the adapter is in blocks there.
    """
    if chosen.active_from == "start":
        return "start", (), list(datasets)
    is_asked_for = settings.active_from is not None or init is not None
    if without := _chosen_without_activation(chosen, manifest):
        reason = f"PEFT has no activated LoRA for {without} of this base model"
        if is_asked_for:
            raise UsageError(f"{reason}; leave these out of --target-modules, or take --active-from start")
        say(f"adapters act at all tokens: {reason} (--active-from)")
        return "start", (), list(datasets)
    if datasets[0].facts.is_plain_text:
        reason = f"data of the form {datasets[0].facts.form!r} have no answers"
        if settings.active_from is not None:
            raise UsageError(f"--active-from answer: {reason}; use --active-from start")
        if init is not None:
            raise UsageError(f"--init-adapter acts on answers, and {reason}; give data with prompts")
        say(f"adapters act at all tokens: {reason} (--active-from)")
        return "start", (), list(datasets)
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
        say("adapters act at all tokens: the prompts have no common end that begins the answers (--active-from)")
        return "start", (), list(datasets)
    for dataset in cut[1:]:
        if line := uninvoked_line(dataset, invocation):
            say(line)
    if len(cut[0]) > len(datasets[0]):
        say(f"each answer is an example of its own: {len(cut[0]):,} of {len(datasets[0]):,} conversations")
    if line := _left_out_line(chosen, manifest, on_device=on_device):
        say(line)
    say(
        "adapters act from the beginning of the answer on (activated LoRA): PEFT loads them so, and cannot merge them "
        "into the base model; --active-from start gives some that can be merged"
    )
    return "answer", invocation, cut


def _chosen_without_activation(chosen: ChosenAdapter, manifest: Manifest) -> str:
    """The modules that are to have adapters, and to which PEFT gives no activated LoRA: the ends of their names."""
    modules = _modules(manifest, target_modules_of(chosen.target_modules), chosen.blocks)
    return _ends(modules.intersection(manifest.without_activation))


def _left_out_line(chosen: ChosenAdapter, manifest: Manifest, *, on_device: bool) -> str | None:
    """What to say of modules that get no adapters because PEFT does not activate them; None where there are none."""
    names = target_modules_of(chosen.target_modules)
    here = parse_blocks(chosen.blocks, manifest) if on_device else ()
    if names != default_target_modules(chosen.kind, manifest, "answer", here):
        return None
    everything = default_target_modules(chosen.kind, manifest, "start", here)
    modules = _modules(manifest, names, chosen.blocks)
    everywhere = _modules(manifest, everything, chosen.blocks)
    left_out = everywhere - modules
    if not left_out:
        return None
    without = _ends(left_out, modules)
    return f"PEFT has no activated LoRA for {without} of this base model: these get no adapters (--active-from start)"


def _modules(manifest: Manifest, names: tuple[str, ...], blocks: str) -> set[str]:
    """The full names of the modules that get adapters."""
    groups: Sequence[GroupSpec] = choose_groups(manifest, names, parse_blocks(blocks, manifest))
    return set(target_names(groups))


def _ends(names: Iterable[str], others: Iterable[str] = ()) -> str:
    """The last parts of the names, each once, and the one before where it would be one of ``others`` as well."""
    taken = {name.rpartition(".")[2] for name in others}
    ends = {name.rpartition(".")[2]: name for name in names}
    return ", ".join(sorted(".".join(name.split(".")[-2:]) if end in taken else end for end, name in ends.items()))


def default_adapters(kind: KindChoice, manifest: Manifest) -> tuple[AdapterSpec, tuple[GroupSpec, ...]]:
    """What a run has that names no more than the kind: what crosses for a group, and its groups."""
    blocks = parse_blocks(DEFAULTS[kind].blocks, manifest)
    groups = choose_groups(manifest, default_target_modules(kind, manifest, DEFAULTS[kind].active_from), blocks)
    return AdapterSpec(kind, default_rank(kind, manifest, groups)), groups
