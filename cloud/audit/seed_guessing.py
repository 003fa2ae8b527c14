"""The ``lora_A`` that a run began with, where its user chose the seed: whoever guesses the number can draw it again.

A number that a user types has 32 bits at the most, and what crosses in ``open_session`` as the seed of the server's
draws is a digest of it. It does not lead back to the number, but each guess can be checked against it, with no adapter
at all: two million a second on one core, so all numbers that there are in 36 minutes. A seed that the device drew has
128 random bits, and no list of guesses holds it.

The draws are those of ``dlora.edge.seeds`` and ``dlora.edge.adapters``, written anew: the cloud knows no edge.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dlora.protocol.groups import GroupSpec
from dlora.protocol.tensors import FloatArray

DEFAULT_CANDIDATES: Final = range(10_000)
"""What people type. By a product it is three seconds, at rank 8 and width 576; by ``candidates_of`` 5 ms."""

SERVER_CANDIDATES: Final = range(1 << 20)
"""Half a second by ``candidates_of``; all 2^32 that a user can choose take under an hour on one core."""

_SERVER_PREFIX: Final = b"dlora, the server's draws\0"
_ADAPTER_PREFIX: Final = b"dlora, lora_A\0"
_FALSE_ALARM: Final = 1e-6  # how likely a wrong candidate may pass, of all together
_TESTED_PRODUCTS: Final = 4

DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GuessedSeed:
    """A seed that explains what was seen.

    Attributes:
        seed: the user's number.
        lora_A: float32 (r, in_features) of every target module, as the run began, bit for bit.
        lora_B: float32 (out_features, r) of those with a product: ``product · A⁺``. The scaling is in it.
        shares: of the same modules, how much of the product's energy (the squared norm) is explained so, 0 to 1.
    """

    seed: int
    lora_A: dict[str, FloatArray]
    lora_B: dict[str, FloatArray]
    shares: dict[str, float]


def server_seed_of(seed: Sequence[int]) -> int:
    """What crosses as ``seed`` of ``open_session``'s purpose, of a run with this seed (words of 32 bits)."""
    return int.from_bytes(hashlib.sha256(_SERVER_PREFIX + _words(seed)).digest()[:4], "little")


def candidates_of(server_seed: int, candidates: Iterable[int] = DEFAULT_CANDIDATES) -> Iterator[int]:
    """Those of the candidates, 0 to 2**32 - 1, whose run would send ``server_seed``; of wrong ones one in 2**32."""
    wanted = server_seed.to_bytes(4, "little")
    sha256 = hashlib.sha256  # a local name: this is all that the loop does
    for candidate in candidates:
        if sha256(_SERVER_PREFIX + candidate.to_bytes(4, "little")).digest()[:4] == wanted:
            yield candidate


def draw_lora_A(seed: Sequence[int], groups: Sequence[GroupSpec], kind: str, r: int) -> dict[str, FloatArray]:
    """Every ``lora_A`` float32 (r, in_features) that a run begins with, bit for bit as its device draws it.

    Args:
        seed: words of 32 bits; one, where the user chose a number.
        groups: of the session, in its order.
        kind: ``lora``: one A a target module, by its name; ``ffa``: one a group, by the name of its first module.
    """
    random = _generator(seed)
    return {name: _draw(random, r, width) for name, width in _drawn(groups, kind)}


def guess_seed(
    candidates: Iterable[int],
    products: Mapping[str, Tensor],
    groups: Sequence[GroupSpec],
    r: int,
    *,
    server_seed: int | None = None,
) -> GuessedSeed | None:
    """The candidate whose ``lora_A`` explains the products, of a run of the kind ``lora``; None where none does.

    In a run's first steps A has hardly moved, so the rows of ``B · A`` nearly lie in the space of the rows of the A
    that was drawn. Of a wrong candidate's A they lie there by chance: a share of ``r / in_features`` of their energy.
    The test takes the smallest products first, a few of them, in case that one was recovered badly.

    Args:
        candidates: whole numbers, 0 to 2**32 - 1.
        products: float (out_features, in_features) ``scaling · B · A`` of some target modules, by name, of early steps.
        groups: all of the session, in its order: A are drawn one after another.
        server_seed: what crossed as the seed of the server's draws. With it only candidates that give the same are
            looked at, and without products the one that does is the answer, if it is the only one.
    """
    tried = candidates if isinstance(candidates, Sequence) else tuple(candidates)
    if server_seed is not None:
        tried = tuple(candidates_of(server_seed, tried))
    found = _find_by_products(tried, products, groups, r)
    if found is None and server_seed is not None and not products and len(tried) == 1:
        found = tried[0]
    return None if found is None else _explain(found, products, groups, r)


def least_share(r: int, in_features: int, candidates: int) -> float:
    """The share of a product's energy that a candidate's A must hold to be believed.

    A wrong A has nothing to do with the product, however well that was recovered, and holds ``r / in_features`` of it
    on average. It strays furthest from that where the product has rank 1: then the share is Beta(r/2,
    (in_features - r)/2), whose tail has a bound in closed form (Dasgupta and Gupta, 2003, lemma 2.2). The answer is
    where that bound, times the number of candidates, falls to one in a million. At widths of real models that is
    little: 0.12 for 10,000 candidates at rank 8 and width 576, so that A may have moved quite far.
    """
    by_chance = r / in_features

    def log_tail(share: float) -> float:
        inside = r / 2 * math.log(share / by_chance)
        return inside + (in_features - r) / 2 * math.log((1 - share) / (1 - by_chance))

    allowed = math.log(_FALSE_ALARM / max(1, candidates))
    low, high = by_chance, 1.0
    for _ in range(60):  # the tail falls from by_chance on, so halving finds the place
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if log_tail(middle) <= allowed else (middle, high)
    return high


def _find_by_products(
    candidates: Sequence[int], products: Mapping[str, Tensor], groups: Sequence[GroupSpec], r: int
) -> int | None:
    places = _places(groups, r)
    # A unit that is killed has no product; and where A is as wide as its input, its rows hold anything.
    useful = [name for name, product in products.items() if r < product.shape[1] and bool(product.any())]
    for name in sorted(useful, key=lambda name: products[name].numel())[:_TESTED_PRODUCTS]:
        directions = _directions(products[name], r)
        in_features = len(directions)
        enough = least_share(r, in_features, len(candidates) * _TESTED_PRODUCTS)
        for candidate in candidates:
            random = _generator((candidate,), skipped=places[name])
            if _share_inside(_draw(random, r, in_features), directions) >= enough:
                return candidate
    return None


def _explain(seed: int, products: Mapping[str, Tensor], groups: Sequence[GroupSpec], r: int) -> GuessedSeed:
    lora_A = draw_lora_A((seed,), groups, "lora", r)
    lora_B: dict[str, FloatArray] = {}
    shares: dict[str, float] = {}
    for name, tensor in products.items():
        product = tensor.detach().cpu().double().numpy()
        drawn = lora_A[name].astype(np.float64)
        found = product @ np.linalg.pinv(drawn)
        energy = float(np.square(product).sum())
        lora_B[name] = found.astype(np.float32)
        shares[name] = float(np.square(found @ drawn).sum()) / energy if energy else 0.0
    return GuessedSeed(seed, lora_A, lora_B, shares)


def _directions(product: Tensor, r: int) -> DoubleArray:
    """(out_features, in_features) to float64 (in_features, at most r): its first right singular vectors, each as long
    as its singular value, and the squares of all lengths together 1. What is beyond rank r cannot be the adapter's."""
    values = product.detach().cpu().double()
    values = values / values.norm()
    # Eigenvectors of the smaller square: a decomposition of the matrix itself takes much longer.
    if values.shape[0] < values.shape[1]:
        _, vectors = torch.linalg.eigh(values @ values.T)
        directions = values.T @ vectors[:, -r:]
    else:
        squares, vectors = torch.linalg.eigh(values.T @ values)
        directions = vectors[:, -r:] * squares[-r:].clamp_min(0).sqrt()
    found: DoubleArray = (directions / directions.norm()).numpy()
    return found


def _share_inside(lora_A: FloatArray, directions: DoubleArray) -> float:
    """How much of the energy of ``directions``, which is 1, is in the space of the rows of ``lora_A``."""
    drawn = lora_A.astype(np.float64)
    seen = drawn @ directions
    return float((seen * np.linalg.solve(drawn @ drawn.T, seen)).sum())


def _places(groups: Sequence[GroupSpec], r: int) -> dict[str, int]:
    """How many numbers a ``lora`` run draws before the A of each target module, by name."""
    places: dict[str, int] = {}
    drawn = 0
    for name, width in _drawn(groups, "lora"):
        places[name] = drawn
        drawn += r * width
    return places


def _drawn(groups: Sequence[GroupSpec], kind: str) -> Iterator[tuple[str, int]]:
    """Name and width of each A, in the order in which they are drawn."""
    if kind not in ("lora", "ffa"):
        raise ValueError(f"no lora_A is drawn from the seed for adapters of the kind {kind!r}")
    for group in groups:
        for target in group.targets if kind == "lora" else group.targets[:1]:
            yield target.name, group.in_features


def _draw(random: np.random.Generator, r: int, in_features: int) -> FloatArray:
    bound = in_features**-0.5
    return random.uniform(-bound, bound, (r, in_features)).astype(np.float32)


def _generator(seed: Sequence[int], skipped: int = 0) -> np.random.Generator:
    """What every ``lora_A`` is drawn from, as it is after ``skipped`` numbers: each takes one step of the generator."""
    digest = hashlib.sha256(_ADAPTER_PREFIX + _words(seed)).digest()
    bits = np.random.PCG64(int.from_bytes(digest, "little"))  # what numpy's default_rng takes
    return np.random.Generator(bits.advance(skipped) if skipped else bits)


def _words(seed: Sequence[int]) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in seed)
