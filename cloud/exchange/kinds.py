"""What a server computes around the exchange of a group, for each kind of adapter.

Both halves are ordinary torch on both sides of what crosses the wire, and autograd runs backward through them::

    x ── project ──▶ to the device      from the device ──▶ expand ── deltas, added to the frozen products
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from torch import Tensor

from dlora.cloud.model.base_model import BaseModel
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.groups import GroupSpec


class Site(Protocol):
    """One exchange group's torch, for one session. Its own tensors are frozen."""

    def project(self, x: Tensor) -> Tensor:
        """What goes to the device: (rows, in_features) to (rows, input_width)."""

    def expand(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the device gave, (rows, output_width) each, to one delta a target module, (rows, out_features)."""


class SiteKind(Protocol):
    """How a server makes the sites of a kind."""

    def make_state(self, spec: AdapterSpec, group: GroupSpec, base: BaseModel) -> Sequence[Tensor]:
        """What the server keeps of a group, made anew: float32, of the kind's ``state_shapes``."""

    def site(self, spec: AdapterSpec, group: GroupSpec, state: Sequence[Tensor]) -> Site:
        """The site of a group with its ``state``, which is in the base model's dtype, on the group's device."""


class _LoraSite:
    """A and B are on the device, so everything crosses as it is."""

    def project(self, x: Tensor) -> Tensor:
        return x

    def expand(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return outputs


class _Lora:
    def make_state(self, spec: AdapterSpec, group: GroupSpec, base: BaseModel) -> Sequence[Tensor]:
        return ()

    def site(self, spec: AdapterSpec, group: GroupSpec, state: Sequence[Tensor]) -> Site:
        return _LoraSite()


SITE_KINDS: Final[dict[str, SiteKind]] = {"lora": _Lora()}
"""By the names of ``dlora.protocol.adapters.KINDS``."""
