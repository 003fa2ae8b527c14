"""What a server computes around the exchange of a group, for each kind of adapter.

Both halves are ordinary torch on both sides of what crosses the wire, and autograd runs backward through them::

    x ── project ──▶ to the device      from the device ──▶ expand ── deltas, added to the frozen products
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

from torch import Tensor

from dlora.cloud.model.base_model import BaseModel
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.groups import GroupSpec

from .kept_tensor import KeptTensor, multiply
from .sketch import GroupSketch, weight_basis


class Site(ABC):
    """One exchange group's torch, for one session.

    Args:
        state: what the server keeps of the group; frozen. Products with it are computed in float32, as PEFT does: in
            half precision a few small rows would take three times as long.
    """

    @abstractmethod
    def __init__(self, group: GroupSpec, state: Sequence[KeptTensor]) -> None: ...

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """What goes to the device: (rows, in_features) to (rows, input_width)."""

    @abstractmethod
    def expand(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the device gave, (rows, output_width) each, to one delta a target module, (rows, out_features)."""

    @abstractmethod
    def compute_outputs(self, sent: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the device would give for ``sent``, what ``project`` made: (rows, output_width) each.

        ``parameters``: of the kind's ``parameter_shapes``, the scaling in what is nearest to the output.
        """

    @staticmethod
    def make_state(
        spec: AdapterSpec, group: GroupSpec, base: BaseModel, seed: int, sketch: GroupSketch | None
    ) -> tuple[Sequence[Tensor], float]:
        """What the server keeps of a group, made anew, where the kind's ``server_makes_state``.

        Args:
            seed: of random draws, the group's own.
            sketch: of the session's micro-batches of the mode ``basis``; None where there were none.

        Returns: float32 tensors of the kind's ``state_shapes``; and the norm of the gradient that the group's
        parameters would have had, summed over what they were made from, about: 0.0 where that were no gradients.
        """
        raise NotImplementedError


class _LoraSite(Site):
    """All is on the device; what crosses is the module's own."""

    def __init__(self, group: GroupSpec, state: Sequence[KeptTensor]) -> None:
        assert not state

    def project(self, x: Tensor) -> Tensor:
        return x

    def expand(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return outputs

    def compute_outputs(self, sent: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        return [sent.float() @ lora_a.T @ lora_b.T for lora_a, lora_b in pairs]


class _FfaSite(Site):
    """A is here: ``z = A x`` goes to the device, whole deltas come back."""

    def __init__(self, group: GroupSpec, state: Sequence[KeptTensor]) -> None:
        (self._lora_a,) = state

    def project(self, x: Tensor) -> Tensor:
        return multiply(x.float(), self._lora_a)

    def expand(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return outputs

    def compute_outputs(self, sent: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        return [sent @ lora_b.T for lora_b in parameters]


class _BottleneckSite(Site):
    """A and B are here: ``A x`` goes to the device, and B spreads what comes back over the target modules."""

    def __init__(self, group: GroupSpec, state: Sequence[KeptTensor]) -> None:
        self._lora_a, lora_b = state
        self._lora_b = lora_b.split([target.out_features for target in group.targets])

    def project(self, x: Tensor) -> Tensor:
        return multiply(x.float(), self._lora_a)

    def expand(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return [multiply(outputs[0].float(), lora_b) for lora_b in self._lora_b]

    def compute_outputs(self, sent: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        (core,) = parameters
        return [sent @ core.T]

    @staticmethod
    def make_state(
        spec: AdapterSpec, group: GroupSpec, base: BaseModel, seed: int, sketch: GroupSketch | None
    ) -> tuple[Sequence[Tensor], float]:
        if sketch is None:
            return weight_basis(base, group, spec.r, seed), 0.0
        lora_a, lora_b, gradient_norm = sketch.basis()
        return (lora_a, lora_b), gradient_norm


SITE_KINDS: Final[dict[str, type[Site]]] = {"lora": _LoraSite, "ffa": _FfaSite, "bottleneck": _BottleneckSite}
"""By the names of ``dlora.protocol.adapters.KINDS``."""
