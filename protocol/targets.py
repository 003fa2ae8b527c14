"""Which of the modules that a bundle lists are trained: chosen by names, read as PEFT reads them, and by blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

from .choices import UnitKind
from .errors import UsageError
from .groups import GroupSpec, TargetSpec, evenly, group_units
from .manifest import Manifest

ALL_LINEAR: Final = "all-linear"


def choose_groups(
    manifest: Manifest, target_modules: Sequence[str] = (), blocks: Collection[int] = ()
) -> tuple[GroupSpec, ...]:
    """The exchange groups of the chosen modules, in execution order. A group has its chosen modules only.

    Args:
        target_modules: a name selects the modules that it is, or that end in ``.`` and it; ``all-linear``, by itself,
            all of the bundle; none: the bundle's default.
        blocks: of these blocks only; none: of all.

    Raises ``UsageError`` for a name or a block that selects nothing, and where nothing is left.
    """
    for name in target_modules:
        if not _matching_names(manifest, [name]) or (name == ALL_LINEAR and len(target_modules) > 1):
            raise UsageError(f"the bundle has no module {name!r} that can be trained; {_choices_text(manifest.groups)}")
    known = {group.block for group in manifest.groups}
    if unknown := sorted(set(blocks) - known):
        raise UsageError(
            f"--blocks: the bundle has nothing to train in block {unknown[0]}; blocks are {number_ranges(known)}"
        )
    names = tuple(target_modules) or manifest.defaults.target_modules
    selected = _matching_names(manifest, names)
    groups = _filter(manifest, lambda group, target: target.name in selected and (not blocks or group.block in blocks))
    if not groups:
        within = f" in the blocks {number_ranges(blocks)}" if blocks else ""
        raise UsageError(f"the bundle has no module {', '.join(names)}{within}; {_choices_text(manifest.groups)}")
    return groups


def spread_blocks(manifest: Manifest, count: int) -> tuple[int, ...]:
    """``count`` of the blocks that have something to train, as ``spread`` chooses them."""
    return spread({group.block for group in manifest.groups}, count)


def spread(numbers: Iterable[int], count: int) -> tuple[int, ...]:
    """``count`` of ``numbers``, evenly over the upper half of them, the last one included; fewer where there are fewer.

    The upper half, because the server's backward pass ends at the lowest; spread, because neighbours do the same work.
    """
    known = sorted(numbers)
    half = len(known) // 2  # of an odd number the upper one is the larger
    return tuple(known[-count:]) if count >= len(known) - half else evenly(known[half:], count)


def spread_units(
    manifest: Manifest, groups: Sequence[GroupSpec], kind: UnitKind, count: int, *, beside: Collection[int] = ()
) -> tuple[int, ...]:
    """``count`` units of ``groups``, evenly over those in the upper half of the base model's blocks, the last one
    included; where there are fewer, the last ``count``. None of ``beside``, which are chosen already."""
    half = manifest.base_model.blocks // 2
    units = group_units(groups, kind)
    left = [index for index in range(len(units)) if index not in beside]
    upper = [index for index in left if groups[units[index][0]].block >= half]
    return evenly(upper, count) if count <= len(upper) else tuple(left[len(left) - count :])


def last_blocks(manifest: Manifest, count: int) -> tuple[int, ...]:
    """The last ``count`` blocks that have something to train."""
    return tuple(sorted({group.block for group in manifest.groups})[-count:])


def groups_of(manifest: Manifest, names: Collection[str]) -> tuple[GroupSpec, ...]:
    """The exchange groups of the modules with these full names, in execution order, and of no others."""
    return _filter(manifest, lambda _, target: target.name in names)


def names_selecting(manifest: Manifest, groups: tuple[GroupSpec, ...], blocks: Collection[int] = ()) -> tuple[str, ...]:
    """Names that select the modules of ``groups``, as ``groups_of`` gives them, and no others: as short as can be.
    ``blocks``: where they will be looked for; none: in all."""
    short = tuple(module_names(groups))
    is_exact = choose_groups(manifest, short, blocks) == groups
    return short if is_exact else tuple(target_names(groups))


def target_names(groups: Iterable[GroupSpec]) -> list[str]:
    """The full names of all modules, group after group."""
    return [target.name for group in groups for target in group.targets]


def module_names(groups: Iterable[GroupSpec]) -> list[str]:
    """The last parts of the names of all modules, each once, in alphabetical order."""
    return sorted({target.name.rpartition(".")[2] for group in groups for target in group.targets})


def number_ranges(numbers: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` as ``"0-2,5"``, as options take them."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ",".join(str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in ranges)


def _filter(manifest: Manifest, is_chosen: Callable[[GroupSpec, TargetSpec], bool]) -> tuple[GroupSpec, ...]:
    """Groups run in the order of their first module. Without that module, another group may be before them: where
    attention and MLP share their input, its output projection runs between the two."""
    places = iter(manifest.order or range(sum(len(group.targets) for group in manifest.groups)))
    found: list[tuple[int, GroupSpec]] = []
    for group in manifest.groups:
        kept = [(next(places), target) for target in group.targets]
        kept = [(place, target) for place, target in kept if is_chosen(group, target)]
        if kept:
            targets = tuple(target for _, target in kept)
            found.append((kept[0][0], GroupSpec(group.block, group.in_features, targets)))
    return tuple(group for _, group in sorted(found, key=lambda each: each[0]))


def _matching_names(manifest: Manifest, names: Sequence[str]) -> set[str]:
    """The full names of the modules that PEFT takes for these names."""
    modules = set(target_names(manifest.groups))
    if tuple(names) == (ALL_LINEAR,):
        return modules
    endings = tuple(f".{name}" for name in names)
    return {module for module in modules if module.endswith(endings)} | modules.intersection(names)


def _choices_text(groups: Iterable[GroupSpec]) -> str:
    return f"--target-modules can be: {', '.join([*module_names(groups), ALL_LINEAR])}"
