"""The suites that need no torch: protocol, adapters' scores, checkpoints, data. They also run on aarch64."""

from __future__ import annotations

SUITES = (
    "frames", "session", "refusals", "link", "deadline", "checkpoint", "scores", "edge_data", "data_split", "passes",
    "tensor_file", "pause",
)  # fmt: skip
