"""Kill server and device, SIGKILL, many times in one run, at random messages; then compare with a run without.

    python tests/faults/repeated_kills.py --kills 20 --steps 60 --model smollm2-135m

Devices go on with --resume, servers are started again on the same port. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from fault_proxy import Boundary, Fault, Plan  # noqa: E402
from fault_run import LONG_S, FaultRun, Place, Reference, Replicas, make_place, record, replicas, write_data  # noqa: E402
from forked import spawn_command  # noqa: E402

MESSAGES = 8
"""Every step has at least so many messages, whatever is killed and revived."""


def storm(
    place: Place, running: Replicas, reference: Reference, out: Path, options: Sequence[object], *, kills: int,
    steps: int,
) -> dict[str, Any]:  # fmt: skip
    """Kill as often at random messages of random steps, each once; victims take turns in random order."""
    chance = random.Random(1)
    victims = [(Fault.KILL_DEVICE, Fault.KILL_SERVER)[index % 2] for index in range(kills)]
    chance.shuffle(victims)
    fault_run = FaultRun(place, running, out, options, most_restarts=kills, timeout_s=LONG_S)
    fault_run.proxy.plan(
        *(Plan(victim, Boundary(step=chance.randrange(steps), nth=chance.randrange(MESSAGES))) for victim in victims)
    )
    started = time.perf_counter()
    outcome = fault_run.run()
    fault_run.compare(outcome, reference)
    done = fault_run.proxy.done
    return {
        "kills_server": done.count(Fault.KILL_SERVER),
        "kills_device": done.count(Fault.KILL_DEVICE),
        "steps": steps,
        "bit_equal": not outcome.wrong,
        "steps_lost": outcome.steps_lost,
        "steps_doubled": outcome.steps_doubled,
        "device_restarts": outcome.restarts,
        "sessions_opened": fault_run.proxy.counts["session_opened"],
        "wrong": outcome.wrong,
        "wall_s": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Exit with 1 where a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--model", default="smollm2-135m", help="tiny: random weights, for a quick look")
    parser.add_argument("--bundle", type=Path, default=Path("build/smollm2"))
    options = parser.parse_args()
    train = (
        "--batch-size", 2, "--grad-accum", 2, "--steps", options.steps, "--save-every", 5, "--threads", 2, "--seed", 0,
        "--active-fraction", 0.125, "--kr-score", "grad",
        "--set", "kill_revive.warmup_steps=10", "--set", "kill_revive.kill_every=5",
        "--set", "kill_revive.revive_every=10", "--set", "kill_revive.probation=5",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if options.model == "tiny":
            made = make_place(directory)
            place = Place(directory, train, made.model, made.bundle, spawn_command)
        else:
            if not (options.bundle / "manifest.json").exists():
                raise SystemExit(f"error: no bundle in {options.bundle}; make it: dlora-export {options.model}")
            write_data(directory / "data.jsonl", rows=40)
            place = Place(directory, train, options.model, options.bundle.resolve(), spawn_command)
        print("training without a disturbance", file=sys.stderr, flush=True)
        with replicas(place, directory / "servers", ("--drain-s", 5), count=1) as running:
            started = time.perf_counter()
            reference = record(place, running, directory / "reference" / "out", watch=False)
            undisturbed_s = round(time.perf_counter() - started, 1)
            print(f"done in {undisturbed_s} s; now with {options.kills} kills", file=sys.stderr, flush=True)
            out = directory / "storm" / "out"
            result = storm(place, running, reference, out, (), kills=options.kills, steps=options.steps)
    result |= {"model": options.model, "undisturbed_wall_s": undisturbed_s}
    print(json.dumps(result, indent=1))
    if not result["bit_equal"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
