"""A fleet: what replicas, tenants and many sessions do and cost. One part a name in --only, all by default.

    replicas   eight devices, two replicas behind HAProxy, which are cut off, killed and drained
    accounts   two servers that share a ledger: tokens that are revoked, a Valkey that is killed
    tenancy    eight devices, and eight PEFT processes: memory, and tokens a second of processor time
    sessions   a thousand sessions that do nothing, and five thousand that come and go
    metrics    what counting costs a step
    costs      processor time, bytes and round trips of a real model's steps
    devices    a thousand devices at four replicas, and what a formula says of their steps a second

What has to be reached is written into docs/log/benchmarks/fleet.json. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import fleet_accounts
import fleet_costs
import fleet_devices
import fleet_metrics
import fleet_replicas
import fleet_sessions
import fleet_tenancy
from bars import Entry, write_bars
from children import log, need_bundle, new_parser

COMMAND: Final = "python benchmarks/fleet.py"
FILE: Final = Path("benchmarks") / "fleet.json"
PARTS: Final = ("replicas", "accounts", "tenancy", "sessions", "metrics", "costs", "devices")


def main() -> None:
    """Measure, and write the bars of each part once it is through."""
    options = _options()
    result: dict[str, Any] = {}
    for part in options.only:
        with tempfile.TemporaryDirectory() as directory:
            for name, found, bars in _measured(part, Path(directory), options):
                result.setdefault(part, {})[name] = found
                log(f"{part}, {name}: {json.dumps(found)}")
                write_bars(options.docs / FILE, bars)
    print(json.dumps(result, indent=1))


def _measured(
    part: str, directory: Path, options: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any], dict[str, Entry]]]:
    """Of each case of a part: its name, what was found, and its bars."""
    command = f"{COMMAND} --only {part}"
    if part == "replicas":
        for case in fleet_replicas.cases(directory, options.cases, need_bundle(options.bundle)):
            found = fleet_replicas.measure(case, directory / case.name)
            yield case.name, found, fleet_replicas.bars(case.name, found, command)
    if part == "accounts":
        found = fleet_accounts.measure(directory)
        yield "two servers", found, fleet_accounts.bars(found, command)
    if part == "tenancy":
        for dtype in fleet_tenancy.MEMORY:
            found = fleet_tenancy.measure(directory / dtype, options.model, need_bundle(options.bundle), dtype)
            yield dtype, found, fleet_tenancy.bars(dtype, found, command)
    if part == "metrics":
        found = fleet_metrics.measure(directory)
        yield "a tiny model", found, fleet_metrics.bars(found, command)
    if part == "sessions":
        found = fleet_sessions.measure(directory)
        yield "one server", found, fleet_sessions.bars(found, command)
    if part == "costs":
        for case in fleet_replicas.cases(directory, ("live", "passes"), need_bundle(options.bundle)):
            yield case.name, fleet_costs.measure(case, directory / f"{case.name}-costs"), {}
    if part == "devices":
        found = fleet_devices.measure(directory)
        yield "four replicas", found, fleet_devices.bars(found, command)


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--cases", nargs="+", choices=("tiny", "live", "passes"), default=("tiny", "live", "passes"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
