"""One training step after another, and what it needs to go on."""
