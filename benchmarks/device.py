"""The device's memory in a real training run, with each bundle and kind of adapter, beside what ``plan`` reckons.

Of ``dlora-edge train`` against a real server: the peak that it says itself, and at the highest that was seen from
outside its anonymous pages, which are the process's own, and its file pages, what is mapped of weights and libraries,
which the system can take back. Prints one JSON object; memory is in MB of 10**6 bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from children import cloud_server, log, need_bundle, write_texts

from dlora.edge.run.footprint import training_mb
from dlora.protocol.choices import KindChoice
from dlora.protocol.manifest import load_manifest

KINDS: Final[tuple[KindChoice, ...]] = ("lora", "bottleneck")
SAMPLE_S: Final = 0.005


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--bundle", type=Path, nargs="+", default=[Path("build/smollm2"), Path("build/smollm2-int8")])
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a step, in two sequences")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.machine(), "tokens": options.tokens}
    with tempfile.TemporaryDirectory() as folder, cloud_server(options.model, options.threads) as url:
        data = Path(folder) / "text.jsonl"
        write_texts(data)
        for number, bundle in enumerate(map(need_bundle, options.bundle)):
            for kind in KINDS:
                log(f"training {kind} with {bundle}")
                measured = _train(kind, bundle, url, data, Path(folder) / f"{number}-{kind}", options)
                estimate = round(training_mb(load_manifest(bundle), kind=kind), 1)
                found.setdefault(str(bundle), {})[kind] = {**measured, "estimated_mb": estimate}
    print(json.dumps(found, indent=1))


def _train(
    kind: KindChoice, bundle: Path, url: str, data: Path, out: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Two sequences a step, every token of them a label."""
    command = [
        sys.executable, "-m", "dlora.edge", "train", "--kind", kind, "--bundle", bundle, "--server", url,
        "--data", data, "--out", out, "--steps", options.steps, "--batch-size", 2,
        "--max-length", options.tokens // 2, "--too-long", "truncate", "--threads", options.threads,
        "--active-fraction", 0.125, "--kr-score", "grad", "--seed", 0, "--json",
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    highest = {"rss_mb": 0.0}
    while process.poll() is None:
        highest = max(highest, _pages(process.pid), key=lambda pages: pages["rss_mb"])
        time.sleep(SAMPLE_S)
    assert process.stdout is not None
    if process.returncode:
        raise SystemExit("error: dlora-edge train failed; its error is above")
    return {"peak_rss_mb": json.loads(process.stdout.read())["peak_rss_mb"], **highest}


def _pages(process: int) -> dict[str, float]:
    """Resident pages of a process in MB; 0 where it has ended."""
    text = Path(f"/proc/{process}/status").read_text()
    fields = {"rss_mb": "VmRSS", "anonymous_mb": "RssAnon", "file_mb": "RssFile"}
    found = {name: re.search(rf"{field}:\s*(\d+) kB", text) for name, field in fields.items()}
    return {name: round(int(match[1]) * 1024 / 1e6, 1) if match else 0.0 for name, match in found.items()}


if __name__ == "__main__":
    main()
