"""The frozen A and B of bottleneck adapters: top singular vectors of the base model's gradient, or of its weights.

The gradient of a group's weight is a sum of outer products, of what goes into its modules and of the gradients of what
comes out of them: both are here in an ordinary backward pass. It is never held whole. Two sketches of it are, as narrow
as a few times the rank, and one pass over the data makes them::

    Y = G Ω      W = Ψ G      Q = orth(Y)      G ≈ Q (Ψ Q)⁺ W

(Tropp, Yurtsever, Udell and Cevher, arXiv 1609.00048, algorithm 4, with k = 3r + 1 and l = 2k + 1: on SmolLM2 they
hold 99.8 % or more of what the best r singular vectors hold.) The idea of the gradient's singular vectors as a basis
is that of LoRA-SB (Ponkshe et al., arXiv 2411.19557).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlora.cloud.model.base_model import BaseModel
from dlora.protocol.errors import NonFiniteError
from dlora.protocol.groups import GroupSpec

_POWER_ITERATIONS: Final = 4
_OVERSAMPLED: Final = 10


class GroupSketch:
    """The gradient of one group's weights, stacked over its modules: (out_features, in_features), as two sketches.

    Args:
        seed: of the random test matrices; the same one, data and machine give the same basis.
    """

    def __init__(self, group: GroupSpec, r: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        wide, tall = _sketch_sizes(group, r)
        self.r = r
        self._omega = torch.randn(group.in_features, wide, generator=generator).to(device)
        self._psi = torch.randn(tall, group.out_features, generator=generator).to(device)
        self._range = torch.zeros(group.out_features, wide, device=device)
        self._co_range = torch.zeros(tall, group.in_features, device=device)

    def add(self, x: Tensor, grad: Tensor, first: int) -> None:
        """Add the gradient that one module's rows give: ``gradᵀ x``.

        Args:
            x: (rows, in_features), what went in; grad: (rows, width), the gradient of what came out.
            first: where the module's outputs begin among the group's.
        """
        x, grad = x.float(), grad.float()
        outputs = slice(first, first + grad.shape[1])
        self._range[outputs] += grad.T @ (x @ self._omega)
        self._co_range += (self._psi[:, outputs] @ grad.T) @ x

    def basis(self) -> tuple[Tensor, Tensor, float]:
        """A (r, in_features) and B (out_features, r), orthonormal, and the norm of the gradient between them,
        ``||Bᵀ G Aᵀ||_F``. Raises ``NonFiniteError``."""
        if not (torch.isfinite(self._range).all() and torch.isfinite(self._co_range).all()):
            raise NonFiniteError("NaN or infinity in the base model's gradients")
        # Few numbers, and badly conditioned where the gradient has a low rank: in float64 it costs nothing.
        q, _ = torch.linalg.qr(self._range.double())
        q, mixed, co_range = q.cpu(), (self._psi.double() @ q).cpu(), self._co_range.double().cpu()
        # Well conditioned whatever the gradient's rank is: q is orthonormal, and psi is random.
        core = torch.linalg.lstsq(mixed, co_range, driver="gels").solution
        u, values, right = torch.linalg.svd(core, full_matrices=False)
        norm = float(torch.linalg.vector_norm(values[: self.r]))
        return right[: self.r].float(), (q @ u[:, : self.r]).float(), norm


def sketch_bytes(group: GroupSpec, r: int) -> int:
    """What a ``GroupSketch`` takes, its test matrices among it."""
    wide, tall = _sketch_sizes(group, r)
    return 4 * (wide + tall) * (group.in_features + group.out_features)


def _sketch_sizes(group: GroupSpec, r: int) -> tuple[int, int]:
    wide = min(3 * r + 1, group.in_features, group.out_features)
    return wide, 2 * wide + 1


def weight_basis(base: BaseModel, group: GroupSpec, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """A (r, in_features) and B (out_features, r): top singular vectors of the stacked weights, by subspace iteration
    (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4)."""
    modules = [base.targets[target.name].module for target in group.targets]
    weights = torch.cat([_weight(module) for module in modules]).float()
    generator = torch.Generator().manual_seed(seed)
    columns = min(r + _OVERSAMPLED, *weights.shape)
    q = torch.linalg.qr(weights @ torch.randn(weights.shape[1], columns, generator=generator).to(weights.device))[0]
    for _ in range(_POWER_ITERATIONS):
        q = torch.linalg.qr(weights @ torch.linalg.qr(weights.T @ q)[0])[0]
    u, _, right = torch.linalg.svd((q.T @ weights).cpu(), full_matrices=False)
    return right[:r].contiguous(), q.cpu() @ u[:, :r]


def _weight(module: nn.Module) -> Tensor:
    """(out_features, in_features)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()
