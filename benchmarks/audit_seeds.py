"""How soon a server guesses the seed of a run whose user chose one: ``--seed N`` has 32 bits.

What crosses as the seed of the server's draws is a digest of it. It does not lead back to the number, but each guess
can be checked against it, with no adapter at all. A seed that a device drew has 128 random bits, and no list of guesses
holds it. Prints JSON: the seeds that fit the frames of a ``dlora-edge train --record DIR``, and how many guesses one
core makes a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from dlora.cloud.audit.observed import observe
from dlora.protocol import messages as m
from dlora.protocol.recording import read_recording

_PREFIX: Final = b"dlora, the server's draws\0"  # as edge/seeds.py has it


def seeds_that_fit(server_seed: int, candidates: Iterable[int]) -> Iterator[int]:
    """Those of the candidates, 0 to 2**32 - 1, whose run would send ``server_seed``; of wrong ones one in 2**32."""
    wanted = server_seed.to_bytes(4, "little")
    sha256 = hashlib.sha256  # a local name: this is all that the loop does
    for candidate in candidates:
        if sha256(_PREFIX + candidate.to_bytes(4, "little")).digest()[:4] == wanted:
            yield candidate


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", type=Path)
    parser.add_argument("--guesses", type=int, default=1 << 20, help="so many numbers, from 0 on; all are 4294967296")
    options = parser.parse_args()
    purpose = observe(read_recording(options.frames)).openings[0].purpose
    if not isinstance(purpose, m.Train):
        raise SystemExit(f"{options.frames}: no run of training")
    started = time.perf_counter()
    found = list(seeds_that_fit(purpose.seed, range(options.guesses)))
    seconds = time.perf_counter() - started
    found_in = {"guesses": options.guesses, "guesses_a_second": round(options.guesses / seconds)}
    print(json.dumps({"seeds": found, **found_in}))


if __name__ == "__main__":
    main()
