"""Both halves of an audit: a device records a short run on real dialogue, and whoever has the base weights attacks it.

    python examples/record_and_audit.py                       the default recipe
    python examples/record_and_audit.py --kind lora           options of dlora-edge train
    python examples/record_and_audit.py --bundle build/smollm2-blocks --device-blocks 12

It leaves build/audit/audit.html.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dialogue import write_dialogue

OUT = Path("build/audit")
BUNDLE = Path("build/smollm2")
MODEL = "smollm2-135m"
BIN = Path(sys.executable).parent
# Server and device share the cores; idle OpenMP threads would spin on them.
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def main() -> None:
    """Record, and attack."""
    options = sys.argv[1:]
    if {"-h", "--help"} & set(options):
        print(__doc__)
        return
    recording = OUT / "recording"
    for path in (recording, OUT / "run"):
        shutil.rmtree(path, ignore_errors=True)
    OUT.mkdir(parents=True, exist_ok=True)
    if "--bundle" not in options:
        if not (BUNDLE / "manifest.json").exists():
            _run("dlora-export", MODEL, "--out", BUNDLE)
        options += ["--bundle", str(BUNDLE)]
    data, _ = write_dialogue(OUT, held_out=100, seed=0)
    with _server() as url:
        _run(
            "dlora-edge", "train", "--server", url, "--data", data, "--out", OUT / "run", "--steps", "4",
            "--batch-size", "6", "--record", recording, *options,
        )  # fmt: skip
    _run(
        "dlora-cloud", "audit", MODEL, "--frames", recording / "frames", "--truth", recording / "truth", "--out",
        OUT / "audit.html",
    )  # fmt: skip


@contextmanager
def _server() -> Iterator[str]:
    """A server on a free port; its log goes to build/audit/server.log."""
    command = [BIN / "dlora-cloud", "serve", MODEL, "--port", "0", "--json", "--state-dir", OUT / "state"]
    with (OUT / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=ENVIRONMENT)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the server did not start; {OUT / 'server.log'} says why")
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.wait(20)


def _run(*command: object) -> None:
    words = [str(BIN / str(command[0])), *map(str, command[1:])]
    code = subprocess.run(words, env=ENVIRONMENT, check=False).returncode
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
