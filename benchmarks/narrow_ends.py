"""What a narrower LM head and token embedding cost in loss, after training with them.

Each set is trained with a bundle of each kind, with the default recipe, and tested with the adapter and the bundle that
it was trained with: what a device has. Losses are kept in ``docs/log/benchmarks/narrow-ends.json``, where a run that is
there is not made again; the mean over seeds of what is lost to fp16 stands as bars in ``shapes.json`` beside it. Prints
one JSON object.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Final

from bars import at_most, write_bars
from children import cloud_server, log, new_parser, run_json
from trained_losses import SETS, TrainedLosses

ENDS: Final[dict[str, tuple[str, ...]]] = {
    "fp16": ("--head-dtype", "fp16"),
    "int8": ("--head-dtype", "int8", "--embedding-dtype", "int8"),
    "int4 head": ("--head-dtype", "int4"),
    "int4": ("--head-dtype", "int4", "--embedding-dtype", "int4"),
}
MOST_LOST: Final = 0.02  # nats a label


def main() -> None:
    """Print one JSON object."""
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with banking77/ in it")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--ends", default=",".join(ENDS), help="fp16 is what the others are compared with")
    options = parser.parse_args()
    ends, kept = options.ends.split(","), options.docs / "benchmarks" / "narrow-ends.json"
    with tempfile.TemporaryDirectory() as folder:
        work, sets = Path(folder), options.sets.split(",")
        losses = TrainedLosses(
            options.model, kept, options.data, work, sets, options.seeds, options.steps, options.threads
        )
        with cloud_server(options.model, options.threads) as url:
            for each in filter(losses.missing, ends):
                bundle = work / each.replace(" ", "-")
                log(f"exporting {each}")
                run_json("-m", "dlora.export", options.model, "--out", bundle, *ENDS[each], "--json")
                losses.measure(each, bundle, url)
    lost = {
        each: {name: [ours - fp16 for ours, fp16 in both] for name, both in losses.pairs(each, "fp16").items()}
        for each in ends
        if each != "fp16"
    }
    command = f"python benchmarks/narrow_ends.py --steps {options.steps} --seeds {options.seeds} --data DATA"
    bars = {
        f"lost_with_{each.replace(' ', '_')}_{name}": at_most(MOST_LOST, mean(of_set), command)
        for each, of_sets in lost.items()
        for name, of_set in of_sets.items()
    }
    write_bars(options.docs / "benchmarks" / "shapes.json", bars)
    print(json.dumps({"losses": losses.found, "lost": lost}, indent=1))


if __name__ == "__main__":
    main()
