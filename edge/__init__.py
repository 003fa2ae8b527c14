"""The device: data, embedding, head, adapters, optimizer and checkpoints. No torch."""

import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime's packages report to its maker unless this is set before they are loaded. What a device does is its own.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from .client.datum import Datum
    from .client.sampling_client import SamplingClient
    from .client.training_client import TrainingClient
    from .settings import Settings

__all__ = ["Datum", "SamplingClient", "Settings", "TrainingClient"]


def __getattr__(name: str) -> Any:
    # Loaded when they are asked for: the commands need none of it.
    if name == "TrainingClient":
        from .client.training_client import TrainingClient

        return TrainingClient
    if name == "SamplingClient":
        from .client.sampling_client import SamplingClient

        return SamplingClient
    if name == "Datum":
        from .client.datum import Datum

        return Datum
    if name == "Settings":
        from .settings import Settings

        return Settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
