"""The seed of a run, and the numbers that are drawn from it: adapters start from it, and the data's order.

Whoever knows a run's seed can compute every ``lora_A`` that it began with, and from that and what crosses the wire the
rest. So it stays here. The server sees some of what is drawn, the order of the data at the least, and the state of
numpy's generators can be computed from what they give: each use has a generator of its own, whose seed is a SHA-256 of
the run's.
"""

from __future__ import annotations

import hashlib
import secrets

import numpy as np

Seed = tuple[int, ...]
"""Words of 32 bits; one, where the user chose a number."""

_RANDOM_WORDS = 4


def draw_seed() -> Seed:
    """128 random bits."""
    return tuple(secrets.randbits(32) for _ in range(_RANDOM_WORDS))


def adapter_generator(seed: Seed) -> np.random.Generator:
    """What every ``lora_A`` is drawn from."""
    return _generator(seed, "lora_A")


def order_generator(seed: Seed, epoch: int) -> np.random.Generator:
    """What the order of an epoch's data is drawn from."""
    return _generator(seed, f"order of epoch {epoch}")


def seed_for_server(seed: Seed) -> int:
    """The seed of the server's draws, 0 to 2**32 - 1: the same for the same run, wherever it goes on."""
    return int.from_bytes(_digest(seed, "the server's draws")[:4], "little")


def _generator(seed: Seed, use: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(_digest(seed, use), "little"))


def _digest(seed: Seed, use: str) -> bytes:
    return hashlib.sha256(f"dlora, {use}\0".encode() + np.array(seed, "<u4").tobytes()).digest()
