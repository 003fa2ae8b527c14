"""The frozen A and B of bottleneck adapters: directions in which a device's own data vary most, or those of weights.

A holds what goes into a group's modules best: the top eigenvectors of ``Σ x xᵀ`` over rows x, which is what EVA takes
for LoRA's A (Paischer et al., arXiv 2410.07170). B holds the gradients of what comes out of them, in the same way: of
``Σ g gᵀ``, stacked over the modules. Both are here in an ordinary backward pass of the base model. Rows count one by
one: a gradient summed over a batch has far fewer directions than those of its tokens have, and a basis of its singular
vectors is worse for what comes later in training (docs/log/decisions/0037).

Neither matrix is held, which would be larger than the weights. A sketch of each is, as wide as a few times the rank,
and one pass over the data makes it (Tropp, Yurtsever, Udell and Cevher, arXiv 1706.05736)::

    Y = M Ω      M ≈ Y (Ωᵀ Y)⁺ Yᵀ
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel
from dlora.protocol.errors import NonFiniteError
from dlora.protocol.groups import GroupSpec

_NOISE: Final = 1e-10  # of the largest eigenvalue: float32 sums of rows that are none leave less
_LARGE: Final = 1e3  # squared norm, in the median's
_POWER_ITERATIONS: Final = 4
_OVERSAMPLED: Final = 10


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within, torch computes with one thread. A decomposition is many short pieces of work, after each of which threads
    wait for each other. MKL's spin while they wait, and on a busy machine that took minutes for what takes a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class MomentSketch:
    """A sketch of ``Σ v vᵀ`` over rows v: (width, width) in (width, columns).

    A few tokens' hidden states are thousands of times as large as all others. In a float32 sum with them the others
    lose all but two or three digits, and which ones depends on the order in which a processor adds. So these rows are
    added in float64; float32 is enough for the others, and twice as fast.

    Args:
        generator: draws the test matrix, on the CPU.
    """

    def __init__(self, width: int, columns: int, generator: torch.Generator, device: torch.device) -> None:
        with _one_thread():
            self.omega = torch.linalg.qr(torch.randn(width, columns, generator=generator))[0].to(device)
        self.product = torch.zeros_like(self.omega, dtype=torch.float64)

    def add(self, rows: Tensor) -> Tensor:
        """Add rows, float32 (rows, width); gives ``rows Ω``."""
        mixed: Tensor = rows @ self.omega
        sizes = rows.square().sum(1)
        typical = torch.where(sizes > 0, sizes, torch.nan).nanmedian()
        is_large = ~(sizes <= _LARGE * typical)  # NaN, too
        self.product += rows.T @ mixed.masked_fill(is_large[:, None], 0.0)
        if is_large.any():
            large = rows[is_large].double()
            self.product.addmm_(large.T, large @ self.omega.double())
        return mixed

    @_one_thread()
    def top_eigenvectors(self, r: int) -> Tensor:
        """The r of the largest eigenvalues, float64 (width, r) on the CPU, orthonormal. Raises ``NonFiniteError``."""
        if not torch.isfinite(self.product).all():
            raise NonFiniteError("NaN or infinity in the base model's hidden states or gradients")
        # Few numbers, and badly conditioned where the rows have few directions: in float64 it costs nothing.
        omega, product = self.omega.cpu().double(), self.product.cpu()
        mixed = omega.T @ product
        values, vectors = torch.linalg.eigh((mixed + mixed.T) / 2)
        # No higher: beside one row that is ten thousand times as large as others, theirs are at 1e-8.
        is_noise = values <= _NOISE * values[-1].clamp_min(0.0)
        roots = torch.where(is_noise, 0.0, values.clamp_min(torch.finfo(torch.float64).tiny).rsqrt())
        left: Tensor = torch.linalg.svd(product @ (vectors * roots), full_matrices=False)[0]
        return left[:, :r]


class GroupSketch:
    """What is learnt of one group: sketches of what goes in and of the gradients of what comes out.

    Args:
        seed: of the random test matrices; the same one, data and machine give the same basis.
    """

    def __init__(self, group: GroupSpec, r: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.r = r
        self._inputs = MomentSketch(group.in_features, _columns(group.in_features, r), generator, device)
        self._grads = MomentSketch(group.out_features, _columns(group.out_features, r), generator, device)
        self._gradient = torch.zeros(self._grads.omega.shape[1], self._inputs.omega.shape[1], device=device)

    def add(self, x: Tensor, grads: Tensor) -> None:
        """Add rows.

        Args:
            x: (rows, in_features), what went into the group's modules.
            grads: (rows, out_features), the gradients of what came out of them, one module's beside the other's.
        """
        self._gradient += self._grads.add(grads.float()).T @ self._inputs.add(x.float())

    @_one_thread()
    def basis(self) -> tuple[Tensor, Tensor, float]:
        """A (r, in_features) and B (out_features, r), orthonormal; and an estimate of the norm of the gradient G of the
        group's weights between them, ``||Bᵀ G Aᵀ||_F``: of G only ``Ωᵀ G Ω`` is kept. Raises ``NonFiniteError``."""
        lora_a, lora_b = self._inputs.top_eigenvectors(self.r), self._grads.top_eigenvectors(self.r)
        left, right = self._grads.omega.cpu().double().T @ lora_b, self._inputs.omega.cpu().double().T @ lora_a
        core = torch.linalg.pinv(left) @ self._gradient.cpu().double() @ torch.linalg.pinv(right).T
        return lora_a.T.float().contiguous(), lora_b.float(), float(torch.linalg.matrix_norm(core))


def sketch_bytes(group: GroupSpec, r: int) -> int:
    """What a ``GroupSketch`` takes, its test matrices among it."""
    into, out = _columns(group.in_features, r), _columns(group.out_features, r)
    return 4 * (3 * into * group.in_features + 3 * out * group.out_features + into * out)


def adding_bytes(group: GroupSpec, r: int, rows: int, itemsize: int) -> int:
    """What ``GroupSketch.add`` and who calls it take for so many rows beside the rows themselves: copies of them of
    ``itemsize`` bytes a number, in float32, and mixed twice; of the large ones, half of all at most, in float64 and
    mixed; and the larger of two sums."""
    into, out = _columns(group.in_features, r), _columns(group.out_features, r)
    widths, mixed = group.in_features + group.out_features, into + out
    a_row = (2 * itemsize + 4) * widths + 8 * mixed + 4 * (widths + mixed)
    return rows * a_row + (4 + 8) * max(into * group.in_features, out * group.out_features)


def _columns(width: int, r: int) -> int:
    return min(3 * r + 1, width)


@_one_thread()
def weight_basis(base: BaseModel, group: GroupSpec, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """A (r, in_features) and B (out_features, r): top singular vectors of the stacked weights, each divided by its
    gain, by subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4)."""
    weights = torch.cat([base.targets[target.name].weight.float() / target.gain for target in group.targets])
    generator = torch.Generator().manual_seed(seed)
    columns = min(r + _OVERSAMPLED, *weights.shape)
    q = torch.linalg.qr(weights @ torch.randn(weights.shape[1], columns, generator=generator).to(weights.device))[0]
    for _ in range(_POWER_ITERATIONS):
        q = torch.linalg.qr(weights @ torch.linalg.qr(weights.T @ q)[0])[0]
    u, _, right = torch.linalg.svd((q.T @ weights).cpu(), full_matrices=False)
    return right[:r].contiguous(), q.cpu() @ u[:, :r]
