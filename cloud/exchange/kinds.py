"""What a server computes around the exchange of a group, for each kind of adapter.

Both halves are ordinary torch on both sides of what crosses the wire, and autograd runs backward through them::

    x ── project ──▶ to the device      from the device ──▶ expand ── deltas, added to the frozen products
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from torch import Tensor

from dlora.cloud.model.base_model import BaseModel
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.groups import GroupSpec

from .sketch import GroupSketch, weight_basis


class Site(Protocol):
    """One exchange group's torch, for one session. Its own tensors are frozen."""

    def project(self, x: Tensor) -> Tensor:
        """What goes to the device: (rows, in_features) to (rows, input_width)."""

    def expand(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the device gave, (rows, output_width) each, to one delta a target module, (rows, out_features)."""

    def compute_outputs(self, sent: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the device would give for ``sent``, what ``project`` made: (rows, output_width) each.

        ``parameters``: of the kind's ``parameter_shapes``, the scaling in what is nearest to the output.
        """


@dataclass(frozen=True)
class MadeFrom:
    """What a group's state is made from.

    Attributes:
        seed: of random draws, the group's own.
        sketch: of the session's micro-batches of the mode ``basis``; None where there were none.
    """

    base: BaseModel
    seed: int
    sketch: GroupSketch | None


class MadeState(NamedTuple):
    """What the server keeps of a group, made anew.

    Attributes:
        tensors: float32, of the kind's ``state_shapes``.
        gradient_norm: of the gradient that the group's parameters would have had, summed over what it was made from,
            about; 0.0 where that were no gradients.
    """

    tensors: Sequence[Tensor]
    gradient_norm: float = 0.0


class SiteKind(Protocol):
    """How a server makes the sites of a kind."""

    def make_state(self, spec: AdapterSpec, group: GroupSpec, made_from: MadeFrom) -> MadeState:
        """What the server keeps of a group, where the kind's ``server_makes_state``."""

    def site(self, spec: AdapterSpec, group: GroupSpec, state: Sequence[Tensor]) -> Site:
        """The site of a group with its ``state``, which is in the base model's dtype, on the group's device."""


class _LoraSite:
    """A and B are on the device, so everything crosses as it is."""

    def project(self, x: Tensor) -> Tensor:
        return x

    def expand(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return outputs

    def compute_outputs(self, sent: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        return [sent @ lora_a.T @ lora_b.T for lora_a, lora_b in pairs]


class _Lora:
    def make_state(self, spec: AdapterSpec, group: GroupSpec, made_from: MadeFrom) -> MadeState:
        raise NotImplementedError

    def site(self, spec: AdapterSpec, group: GroupSpec, state: Sequence[Tensor]) -> Site:
        return _LoraSite()


class _FfaSite:
    """A is here: ``z = A x`` goes to the device, whole deltas come back."""

    def __init__(self, lora_a: Tensor) -> None:
        self._lora_a = lora_a

    def project(self, x: Tensor) -> Tensor:
        return x @ self._lora_a.T

    def expand(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return outputs

    def compute_outputs(self, sent: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        return [sent @ lora_b.T for lora_b in parameters]


class _Ffa:
    def make_state(self, spec: AdapterSpec, group: GroupSpec, made_from: MadeFrom) -> MadeState:
        raise NotImplementedError

    def site(self, spec: AdapterSpec, group: GroupSpec, state: Sequence[Tensor]) -> Site:
        (lora_a,) = state
        return _FfaSite(lora_a)


class _BottleneckSite:
    """A and B are here: ``A x`` goes to the device, and B spreads what comes back over the target modules."""

    def __init__(self, lora_a: Tensor, lora_b: Tensor, widths: Sequence[int]) -> None:
        self._lora_a = lora_a
        self._lora_b = lora_b.split(list(widths))

    def project(self, x: Tensor) -> Tensor:
        return x @ self._lora_a.T

    def expand(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return [outputs[0] @ lora_b.T for lora_b in self._lora_b]

    def compute_outputs(self, sent: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        (core,) = parameters
        return [sent @ core.T]


class _Bottleneck:
    def make_state(self, spec: AdapterSpec, group: GroupSpec, made_from: MadeFrom) -> MadeState:
        if made_from.sketch is not None:
            lora_a, lora_b, gradient_norm = made_from.sketch.basis()
            return MadeState((lora_a, lora_b), gradient_norm)
        return MadeState(weight_basis(made_from.base, group, spec.r, made_from.seed))

    def site(self, spec: AdapterSpec, group: GroupSpec, state: Sequence[Tensor]) -> Site:
        lora_a, lora_b = state
        return _BottleneckSite(lora_a, lora_b, [target.out_features for target in group.targets])


SITE_KINDS: Final[dict[str, SiteKind]] = {"lora": _Lora(), "ffa": _Ffa(), "bottleneck": _Bottleneck()}
"""By the names of ``dlora.protocol.adapters.KINDS``."""
