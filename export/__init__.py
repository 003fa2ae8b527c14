"""The exporter: turns a Hugging Face causal language model into a bundle that a device can train with."""

import os

# ONNX Runtime's packages report to its maker unless this is set before they are loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
