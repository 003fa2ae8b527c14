"""From a file to micro-batches of tokens."""
