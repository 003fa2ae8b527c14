"""Coverage-guided fuzzing of all that reads a stranger's bytes: ``python tests/attacks/fuzz.py all --seconds 60``.

One JSON line a target on stdout. Inputs that broke something are kept in ``build/fuzz/``; ``--replay FILE`` runs one
again. Needs ``atheris`` (``pip install atheris``). See FUZZING.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from time import monotonic

ROOT = Path(__file__).parents[2]
CRASHES = ROOT / "build" / "fuzz"
TARGETS = ("decoder", "session", "manifest", "checkpoint", "adapter", "recording")
MAX_INPUT_BYTES = 1 << 16
MAX_GROWTH_BYTES = 512 << 20  # of the address space, over what the loaded libraries take
HANG_S = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=(*TARGETS, "all"))
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=Path, help="run this one input, in the open")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    if options.replay:
        with tempfile.TemporaryDirectory() as directory:
            _target(options.target, Path(directory)).run(options.replay.read_bytes())
        return 0
    if options.worker:
        _work(options.target, options.worker, options.seconds, options.seed)
        return 0
    CRASHES.mkdir(parents=True, exist_ok=True)
    crashes = 0
    for name in TARGETS if options.target == "all" else (options.target,):
        result = _fuzz(name, options.seconds, options.seed)
        print(json.dumps(result), flush=True)
        crashes += int(result["crashes"] or 0)
    return 1 if crashes else 0


def _fuzz(name: str, seconds: int, seed: int) -> dict[str, float | str | None]:
    """Fuzz one target in a process of its own, which a crash ends."""
    before = set(CRASHES.glob(f"{name}-*"))
    started = monotonic()
    # In memory, where the system has such a place: two files are written for each input.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as directory, (CRASHES / f"{name}.log").open("w+") as log:
        options = ["--seconds", str(seconds), "--seed", str(seed), "--worker", directory]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, name, *options]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read()
    kept = set(CRASHES.glob(f"{name}-*")) - before
    edges = re.findall(r"cov: (\d+)", said)
    executions = re.findall(r"number_of_executed_units: (\d+)", said) or re.findall(r"^#(\d+)", said, re.M)
    return {
        "target": name,
        "seconds": round(monotonic() - started, 1),
        "executions": int(executions[-1]) if executions else 0,
        "coverage": int(edges[-1]) if edges else None,
        # A worker that ended badly counts, also where it left no input.
        "crashes": max(len(kept), int(process.returncode != 0)),
        "peak_rss_mb": round(usage.ru_maxrss / 1024, 1),
    }


def _work(name: str, directory: Path, seconds: int, seed: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["dlora"]):
        target = _target(name, directory)
    corpus = directory / "corpus"
    corpus.mkdir()
    for index, data in enumerate(target.corpus):
        (corpus / f"{index}").write_bytes(data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = Random(seed)
        if rng.random() < 0.25:
            return target.sealed(bytes(atheris.Mutate(data, max_size)))[:max_size]
        return target.mutate(bytes(data), rng)[:max_size]

    # An allocation far beyond the input's size becomes a MemoryError, which no target may raise.
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MAX_GROWTH_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    arguments = [
        sys.argv[0], f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={MAX_INPUT_BYTES}", "-len_control=0",
        f"-timeout={HANG_S}", "-rss_limit_mb=1024", "-malloc_limit_mb=256", "-print_final_stats=1",
        f"-artifact_prefix={CRASHES}/{name}-", str(corpus),
    ]  # fmt: skip
    atheris.Setup(arguments, target.run, custom_mutator=mutate)
    atheris.Fuzz()


def _target(name: str, directory: Path):  # type: ignore[no-untyped-def]  # its type is only importable later
    own = directory / name
    own.mkdir()
    return importlib.import_module(f"attacks.fuzz_{name}").target(own)


if __name__ == "__main__":
    sys.exit(main())
