"""Run the whole matrix, every fault at every boundary of a step, and print the table that docs/concepts/faults.md
shows."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from fault_proxy import Fault  # noqa: E402
from fault_run import RUNS  # noqa: E402
from matrix import FAULTS, Cell, Matrix  # noqa: E402

SHORT = {"resumed in place": "resumed", "step run again": "again", "process restarted": "restarted", "went on": "on"}


def main() -> None:
    """Exit with 1 where any case is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one boundary of each kind")
    parser.add_argument("--run", choices=list(RUNS), default="lora", help="what is trained")
    parser.add_argument("--fault", action="append", choices=[fault.name.lower() for fault in FAULTS])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if not options.fault or fault.name.lower() in options.fault]
    started = time.perf_counter()
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as directory, Matrix(Path(directory), options.workers, options.run) as whole:
        for fault in faults:
            for cell in whole.run(whole.cases(fault, thorough=not options.quick)):
                cells.append(cell)
                if cell.outcome.wrong:
                    print(f"{cell.case}: {'; '.join(cell.outcome.wrong)}", file=sys.stderr, flush=True)
            print(f"{fault.value}: done after {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print(_markdown(cells, faults))
    right = sum(not cell.outcome.wrong for cell in cells)
    lost, doubled = (sum(getattr(cell.outcome, name) for cell in cells) for name in ("steps_lost", "steps_doubled"))
    recoveries = dict(Counter(cell.outcome.recovery for cell in cells))
    said = f"{right} of {len(cells)} with the same bits; steps lost {lost}, twice {doubled}; {recoveries}"
    print(said, file=sys.stderr)
    if right < len(cells):
        raise SystemExit(1)


def _markdown(cells: list[Cell], faults: list[Fault]) -> str:
    """A row a kind of boundary, a column a fault: how many cases were right, and how they went on."""
    places = list(dict.fromkeys(cell.case.place for cell in cells))
    lines = ["| at | " + " | ".join(fault.value for fault in faults) + " |", "|---" * (len(faults) + 1) + "|"]
    for place in places:
        row = [f"`{place}`"]
        for fault in faults:
            here = [cell for cell in cells if cell.case.place == place and cell.case.fault is fault]
            right = sum(not cell.outcome.wrong for cell in here)
            ways = sorted({SHORT[cell.outcome.recovery] for cell in here})
            row.append(f"{right}/{len(here)} {', '.join(ways)}" if here else "")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
