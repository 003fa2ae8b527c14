"""Losses after training with variants of one model, kept in a JSON file: a run that is there is not made again, and
one of another model or number of steps is refused.

Each set is trained with the default recipe, and tested with the adapter, the bundle and the server of the variant.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from children import log, run_json
from economy_data import load

from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.files import make_directory, write_atomically

SETS: Final = ("b10", "b20", "dialogue")


@dataclass
class TrainedLosses:
    """Nats a label of test parts, by set, variant and seed.

    Attributes:
        kept: the file; data: the folder with ``banking77/`` in it; work: for bundles, texts and adapters.
        seeds: how many; steps: of a run; threads: of a device.
        found: by set, variant and seed.
    """

    model: str
    kept: Path
    data: Path
    work: Path
    sets: Sequence[str]
    seeds: int
    steps: int
    threads: int
    found: dict[str, dict[str, dict[str, float]]] = field(init=False)

    def __post_init__(self) -> None:
        make_directory(self.kept.parent)
        before = json.loads(self.kept.read_text()) if self.kept.exists() else {**self._of, "losses": {}}
        if {**before, "losses": {}} != {**self._of, "losses": {}}:
            raise SystemExit(f"error: {self.kept} is of another model or number of steps; give another --docs")
        self.found = before["losses"]

    @property
    def _of(self) -> dict[str, object]:
        return {"model": self.model, "steps": self.steps}

    def missing(self, variant: str) -> bool:
        """Whether a run of a variant is not there yet."""
        done = (self.found.get(name, {}).get(variant, {}) for name in self.sets)
        return any(not {str(seed) for seed in range(self.seeds)} <= seeds.keys() for seeds in done)

    def measure(self, variant: str, bundle: Path, url: str) -> None:
        """Make the runs of a variant that are not there."""
        tokenizer = EdgeTokenizer.open(Bundle.open(bundle))
        for name in self.sets:
            load(name, self.data, self.work, tokenizer)
            for seed in range(self.seeds):
                losses = self.found.setdefault(name, {}).setdefault(variant, {})
                if str(seed) not in losses:
                    losses[str(seed)] = self._test_loss(name, bundle, seed, url)
                    log(f"{name}, seed {seed}, {variant}: {losses[str(seed)]}")
                    kept = {**self._of, "losses": self.found}
                    write_atomically(self.kept, json.dumps(kept, indent=1).encode() + b"\n")

    def pairs(self, variant: str, reference: str) -> dict[str, list[tuple[float, float]]]:
        """By set, where all seeds are there: a variant's loss and that of what it is compared with, of each seed."""
        found: dict[str, list[tuple[float, float]]] = {}
        for name, of_set in self.found.items():
            ours, theirs = of_set.get(variant, {}), of_set.get(reference, {})
            both = sorted(ours.keys() & theirs.keys())
            if len(both) >= self.seeds:
                found[name] = [(ours[seed], theirs[seed]) for seed in both]
        return found

    def _test_loss(self, name: str, bundle: Path, seed: int, url: str) -> float:
        out = self.work / f"{name}-{bundle.name}-{seed}"
        shared: list[Any] = ["--bundle", bundle, "--server", url, "--threads", self.threads, "--json"]
        run_json(
            "-m", "dlora.edge", "train", "--data", self.work / f"{name}-train.jsonl", "--hold-out", 0, "--out", out,
            "--batch-size", 8, "--steps", self.steps, "--seed", seed, *shared,
        )  # fmt: skip
        test = self.work / f"{name}-test.jsonl"
        result = run_json("-m", "dlora.edge", "evaluate", "--adapter", out, "--data", test, *shared)
        return round(float(result["loss"]), 4)
