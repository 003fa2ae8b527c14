"""A tiny bundle, data and a server of its model, for devices of every kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from families import save_tiny
from processes import CloudProcess, cloud_process

from dlora.export.bundle import export_bundle
from dlora.export.settings import ExportSettings


@dataclass(frozen=True)
class Place:
    """All of it lies in ``directory``."""

    directory: Path
    server: CloudProcess

    @property
    def bundle(self) -> Path:
        return self.directory / "bundle"

    def train(self, out: Path, steps: int = 3) -> list[object]:
        return train(self.bundle, self.server.url, self.directory / "data.jsonl", out, steps)


@contextmanager
def tiny_place(directory: Path) -> Iterator[Place]:
    save_tiny(directory / "model")
    export_bundle(
        ExportSettings(str(directory / "model"), directory / "bundle", 4, 8.0, head_dtype="fp32", device_blocks=2)
    )
    words = [" ".join(f"w{(7 * row + word) % 89}" for word in range(5 + row % 4)) for row in range(8)]
    (directory / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    with cloud_process(directory / "model", directory / "server") as server:
        yield Place(directory, server)


def train(bundle: Path, url: str, data: Path, out: Path, steps: int) -> list[object]:
    """Arguments of a run on an exact wire."""
    return [
        "train", "--kind", "lora", "--bundle", bundle, "--server", url, "--data", data, "--out", out, "--steps", steps,
        "--batch-size", 2, "--lr", 1e-2, "--wire-dtype", "fp32", "--threads", 1, "--save-every", 1,
        "--seed", 0, "--json",
    ]  # fmt: skip
