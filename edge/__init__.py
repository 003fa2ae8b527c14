"""The device: data, embedding, head, adapters, optimizer and checkpoints. No torch."""

import os

# ONNX Runtime's packages report to its maker unless this is set before they are loaded. What a device does is its own.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
