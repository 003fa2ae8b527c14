"""A fleet: what replicas, tenants and many sessions do and cost. One part a name in --only, all by default.

    replicas   eight devices, two replicas behind HAProxy, which are cut off, killed and drained

What has to be reached is written into docs/log/benchmarks/fleet.json. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, Final

import fleet_replicas
from bars import Entry, write_bars
from children import log, need_bundle, new_parser

COMMAND: Final = "python benchmarks/fleet.py"
FILE: Final = Path("benchmarks") / "fleet.json"
PARTS: Final = ("replicas",)


def main() -> None:
    """Measure, and write the bars of each part once it is through."""
    options = _options()
    result: dict[str, Any] = {}
    for part in options.only:
        result[part] = {}
        with tempfile.TemporaryDirectory() as directory:
            for case in fleet_replicas.cases(Path(directory), options.cases, need_bundle(options.bundle)):
                found = fleet_replicas.measure(case, Path(directory) / case.name)
                result[part][case.name] = found
                log(f"{case.name}: {json.dumps(found)}")
                _write(options, fleet_replicas.bars(case.name, found, f"{COMMAND} --only {part}"))
    print(json.dumps(result, indent=1))


def _write(options: argparse.Namespace, bars: dict[str, Entry]) -> None:
    write_bars(options.docs / FILE, bars)


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--cases", nargs="+", choices=("tiny", "live", "passes"), default=("tiny", "live", "passes"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
