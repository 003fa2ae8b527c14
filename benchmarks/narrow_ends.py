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
from typing import Any, Final

from bars import at_most, write_bars
from children import cloud_server, log, new_parser, run_json
from economy_data import load

from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.files import make_directory, write_atomically

SETS: Final = ("b10", "b20", "dialogue")
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
    ends = options.ends.split(",")
    make_directory(options.docs / "benchmarks")
    kept = options.docs / "benchmarks" / "narrow-ends.json"
    found: dict[str, dict[str, dict[str, float]]] = json.loads(kept.read_text()) if kept.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for each in ends:
            log(f"exporting {each}")
            run_json("-m", "dlora.export", options.model, "--out", work / each, *ENDS[each], "--json")
        tokenizer = EdgeTokenizer.open(Bundle.open(work / "fp16"))
        with cloud_server(options.model, options.threads) as url:
            for name in options.sets.split(","):
                load(name, options.data, work, tokenizer)
                for seed in range(options.seeds):
                    for each in ends:
                        losses = found.setdefault(name, {}).setdefault(each, {})
                        if str(seed) in losses:
                            continue
                        loss = _test_loss(work, name, each, seed, url, options.steps, options.threads)
                        log(f"{name}, seed {seed}, {each}: {loss:.4f}")
                        losses[str(seed)] = round(loss, 4)
                        write_atomically(kept, json.dumps(found, indent=1).encode() + b"\n")
    lost: dict[str, dict[str, list[float]]] = {}
    for name, of_set in found.items():
        for each in of_set.keys() - {"fp16"}:
            both = of_set[each].keys() & of_set["fp16"].keys()
            lost.setdefault(each, {})[name] = [of_set[each][seed] - of_set["fp16"][seed] for seed in sorted(both)]
    command = f"python benchmarks/narrow_ends.py --steps {options.steps} --seeds {options.seeds} --data DATA"
    bars = {
        f"lost_with_{each.replace(' ', '_')}_{name}": at_most(MOST_LOST, mean(losses), command)
        for each, of_sets in lost.items()
        for name, losses in of_sets.items()
        if len(losses) >= options.seeds
    }
    write_bars(options.docs / "benchmarks" / "shapes.json", bars)
    print(json.dumps({"losses": found, "lost": lost}, indent=1))


def _test_loss(work: Path, name: str, ends: str, seed: int, url: str, steps: int, threads: int) -> float:
    """Nats a label of the test part, with the adapter that was trained."""
    out = work / f"{name}-{ends}-{seed}".replace(" ", "-")
    shared: list[Any] = ["--bundle", work / ends, "--server", url, "--threads", threads, "--json"]
    run_json(
        "-m", "dlora.edge", "train", "--data", work / f"{name}-train.jsonl", "--hold-out", 0, "--out", out,
        "--batch-size", 8, "--steps", steps, "--seed", seed, *shared,
    )  # fmt: skip
    result = run_json("-m", "dlora.edge", "evaluate", "--adapter", out, "--data", work / f"{name}-test.jsonl", *shared)
    return float(result["loss"])


if __name__ == "__main__":
    main()
