"""Adapter kinds: what crosses the wire for an exchange group, what a device trains, and what a server keeps.

A kind is known to three places by its name: here (widths and shapes, for both sides), ``dlora.edge.adapters`` (what the
device computes) and ``dlora.cloud.exchange`` (what the server computes around the exchange). Nobody else knows one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Final, Protocol

import msgspec

from .choices import WireDtype
from .errors import UsageError
from .groups import GroupSpec
from .limits import MAX_RANK
from .tensors import DTYPES, stored_width

Shape = tuple[int, ...]

KindName = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class AdapterSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The adapters of a session: all groups have the same kind, a name in ``KINDS``, and rank ``r``. ``options`` are a
    kind's own; none has any so far."""

    kind: KindName = "lora"
    r: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)] = 8
    options: Annotated[dict[KindName, int], msgspec.Meta(max_length=16)] = {}


class Crossing(msgspec.Struct, frozen=True):
    """The widths of what crosses the wire for one exchange group: forward, the server sends a tensor of ``input_width``
    and the device answers with one for each of ``output_widths``; backward, their gradients go the other way."""

    input_width: int
    output_widths: tuple[int, ...]

    @property
    def width(self) -> int:
        """Numbers that cross in one direction and are the most: of the input, or of all outputs together."""
        return max(self.input_width, sum(self.output_widths))

    @property
    def total_width(self) -> int:
        """Numbers that cross in a forward pass, both ways together; in a backward pass as many."""
        return self.input_width + sum(self.output_widths)


class AdapterKind(Protocol):
    """What both sides must know of a kind.

    ``server_makes_state``: whether it can make ``state_shapes``; else the device gives it from the first session on.
    """

    name: str
    server_makes_state: bool

    def crossing(self, spec: AdapterSpec, group: GroupSpec) -> Crossing:
        """What crosses for ``group``. Raises ``UsageError`` where its modules are too narrow for the rank."""

    def parameter_shapes(self, spec: AdapterSpec, group: GroupSpec) -> dict[str, Shape]:
        """What the device trains for ``group``: full names and shapes, all float32, in the optimiser's order."""

    def state_shapes(self, spec: AdapterSpec, group: GroupSpec) -> tuple[Shape, ...]:
        """What the server keeps of ``group`` for the session, and the device has a copy of; nothing for ``lora``."""


class _Lora:
    """LoRA (Hu et al., arXiv 2106.09685): A and B of every target module on the device, full widths on the wire."""

    name = "lora"
    server_makes_state = False

    def crossing(self, spec: AdapterSpec, group: GroupSpec) -> Crossing:
        return Crossing(group.in_features, tuple(target.out_features for target in group.targets))

    def parameter_shapes(self, spec: AdapterSpec, group: GroupSpec) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for target in group.targets:
            shapes[f"{target.name}.lora_A"] = (spec.r, group.in_features)
            shapes[f"{target.name}.lora_B"] = (target.out_features, spec.r)
        return shapes

    def state_shapes(self, spec: AdapterSpec, group: GroupSpec) -> tuple[Shape, ...]:
        return ()


class _Ffa:
    """FFA-LoRA (Sun et al., arXiv 2403.12313): A is frozen and the server's, one for all target modules of a group; B
    of every module is on the device."""

    name = "ffa"
    server_makes_state = False

    def crossing(self, spec: AdapterSpec, group: GroupSpec) -> Crossing:
        return Crossing(spec.r, tuple(target.out_features for target in group.targets))

    def parameter_shapes(self, spec: AdapterSpec, group: GroupSpec) -> dict[str, Shape]:
        return {f"{target.name}.lora_B": (target.out_features, spec.r) for target in group.targets}

    def state_shapes(self, spec: AdapterSpec, group: GroupSpec) -> tuple[Shape, ...]:
        return ((spec.r, group.in_features),)


class _Bottleneck:
    """A frozen A, and a frozen B stacked over a group's target modules, on the server; one core R a group, r by r, on
    the device: ``dW_j = scaling · B_j R A`` (LoRA-XS, Bałazy et al., arXiv 2405.17604, with A and R shared)."""

    name = "bottleneck"
    server_makes_state = True

    def crossing(self, spec: AdapterSpec, group: GroupSpec) -> Crossing:
        narrowest = min(group.in_features, group.out_features)
        if spec.r > narrowest:
            raise UsageError(
                f"{group.targets[0].name} and what shares its input are {narrowest} wide, and a bottleneck is no wider "
                f"than that: --rank {spec.r} is too large; lower it, or leave these out of --target-modules"
            )
        return Crossing(spec.r, (spec.r,))

    def parameter_shapes(self, spec: AdapterSpec, group: GroupSpec) -> dict[str, Shape]:
        return {f"{group.targets[0].name}.core": (spec.r, spec.r)}

    def state_shapes(self, spec: AdapterSpec, group: GroupSpec) -> tuple[Shape, ...]:
        return (spec.r, group.in_features), (group.out_features, spec.r)


KINDS: Final[dict[str, AdapterKind]] = {"lora": _Lora(), "ffa": _Ffa(), "bottleneck": _Bottleneck()}
"""All kinds that this process knows, by name."""


def kind_of(spec: AdapterSpec) -> AdapterKind:
    """The kind of ``spec``. Raises ``UsageError`` where there is none of that name, and for options."""
    kind = KINDS.get(spec.kind)
    if kind is None:
        raise UsageError(f"there are no adapters of the kind {spec.kind!r} here; there are: {', '.join(KINDS)}")
    if spec.options:
        raise UsageError(f"adapters of the kind {spec.kind} have no options, not {', '.join(spec.options)}")
    return kind


def crossings(spec: AdapterSpec, groups: Sequence[GroupSpec]) -> tuple[Crossing, ...]:
    """What crosses for each of ``groups``."""
    kind = kind_of(spec)
    return tuple(kind.crossing(spec, group) for group in groups)


def parameter_count(spec: AdapterSpec, groups: Sequence[GroupSpec]) -> int:
    """How many numbers the device trains."""
    kind = kind_of(spec)
    return sum(math.prod(shape) for group in groups for shape in kind.parameter_shapes(spec, group).values())


def parameter_bytes(spec: AdapterSpec, group: GroupSpec) -> int:
    """Bytes of what the device trains for one group, as float32."""
    return 4 * parameter_count(spec, (group,))


def state_bytes(spec: AdapterSpec, group: GroupSpec, dtype: WireDtype = "fp32") -> int:
    """Bytes of what the server keeps of one group, as a codec stores them: the most in float32."""
    shapes = kind_of(spec).state_shapes(spec, group)
    return DTYPES[dtype].itemsize * sum(rows * stored_width(dtype, width) for rows, width in shapes)


def largest_row(spec: AdapterSpec, groups: Sequence[GroupSpec], *ends: int) -> int:
    """Numbers of the widest row that can cross in a micro-batch; ``ends`` are embedding and hidden size."""
    return max((*ends, *(crossing.width for crossing in crossings(spec, groups))))


def largest_state_bytes(spec: AdapterSpec, groups: Sequence[GroupSpec]) -> int:
    """Bytes of the largest state that one message carries."""
    return max((state_bytes(spec, group) for group in groups), default=0)
