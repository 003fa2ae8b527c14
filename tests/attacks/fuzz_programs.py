"""Changed ExecuTorch programs, each in a process of its own: ``python tests/attacks/fuzz_programs.py BUNDLE COUNT``.

Prints what came of them as a JSON object: how many ran and were refused, by which signal processes died while they
loaded a program and while they ran one, and what else went wrong. SECURITY.md says what that means.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np

from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import DTYPES, Array
from dlora.edge.engine.executorch_engine import ExecutorchEngine
from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import GraphSpec

SIZES = {"tokens": 3, "rank": 2, "rows": 3, "n": 7, "positions": 6, "labelled": 4, "new": 3, "past": 5}
HANG_S = 20


def main() -> int:
    bundle, count = Bundle.open(Path(sys.argv[1])), int(sys.argv[2])
    kinds = list({spec.kind: spec for spec in bundle.manifest.graphs}.values())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    found, other = Counter[str](), []
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(count):
            spec = kinds[seed % len(kinds)]
            content = bundle.file(spec.files["executorch"]).read_bytes()
            changed = Path(directory) / "changed.pte"
            changed.write_bytes(mutated(content, Random(seed)))
            said, status = in_a_child(bundle, spec, changed)
            if os.WIFSIGNALED(status):
                found[f"{said or 'loading'}: {signal.Signals(os.WTERMSIG(status)).name}"] += 1
            elif said in ("ran", "refused"):
                found[said] += 1
            else:
                other.append(f"{spec.kind}, seed {seed}: {said}")
    print(json.dumps({"found": found, "other": other}))
    return 0


def mutated(content: bytes, rng: Random) -> bytes:
    """A bit, a byte or a word changed, or cut short."""
    data = bytearray(content)
    at = rng.randrange(len(data))
    match rng.randrange(4):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        case 2:
            word = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, len(data), rng.randrange(2**32)))
            data[at // 4 * 4 : at // 4 * 4 + 4] = word.to_bytes(4, "little")
        case _:
            del data[at:]
    return bytes(data)


def in_a_child(bundle: Bundle, spec: GraphSpec, program: Path) -> tuple[str, int]:
    """What it said last, and how it ended."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(HANG_S)
        try:
            # No path of a bundle leads elsewhere: it is put in the place of the one that was checked.
            bundle.file = lambda name: program  # type: ignore[method-assign]
            graph = ExecutorchEngine(bundle, 1).load(spec.kind, spec.key)
            os.write(theirs, b"running")
            graph(inputs_of(spec))
            os.write(theirs, b"\nran")
        except BundleError as error:
            os.write(theirs, b"\nrefused" if "\n" not in str(error) else b"\nmore than a line")
        except BaseException as error:
            os.write(theirs, f"\n{error!r}".encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        said = pipe.read().decode()
    return said.rpartition("\n")[2], os.waitpid(pid, 0)[1]


def inputs_of(spec: GraphSpec) -> dict[str, Array]:
    return {
        tensor.name: np.zeros([SIZES[size] if isinstance(size, str) else size for size in tensor.shape],
                              DTYPES[tensor.dtype])
        for tensor in spec.inputs
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
