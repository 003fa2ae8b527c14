"""A whole training run: its directory, its progress, its evaluations, its pauses."""
