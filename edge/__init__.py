"""The device: data, embedding, head, adapters, optimizer and checkpoints. No torch."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# ONNX Runtime's packages report to its maker unless this is set before they are loaded. What a device does is its own.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from .client.datum import Datum
    from .client.sampling_client import SamplingClient
    from .client.training_client import TrainingClient
    from .settings import Settings

__all__ = ["Datum", "SamplingClient", "Settings", "TrainingClient"]

_PLACES = {
    "Datum": ".client.datum",
    "SamplingClient": ".client.sampling_client",
    "Settings": ".settings",
    "TrainingClient": ".client.training_client",
}


def __getattr__(name: str) -> Any:
    # Loaded when they are asked for: the commands need none of it.
    if name in _PLACES:
        return getattr(import_module(_PLACES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
