"""The seed of a run: adapters start from it, and the data's order; the server's draws come from another number.

Whoever knows a run's seed can compute every ``lora_A`` that it began with, and from that and what crosses the wire the
rest. So the seed stays here, and what the server is told says nothing of it, unless it is a number that can be guessed.
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


def seed_for_server(seed: Seed) -> int:
    """The seed of the server's draws, 0 to 2**32 - 1: the same for the same run, wherever it goes on."""
    digest = hashlib.sha256(b"dlora server's draws\0" + np.array(seed, "<u4").tobytes()).digest()
    return int.from_bytes(digest[:4], "little")
