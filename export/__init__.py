"""The exporter: turns a Hugging Face causal language model into a bundle that a device can train with."""
