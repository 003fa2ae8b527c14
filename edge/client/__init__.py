"""Training and sampling from Python: loops of one's own."""
