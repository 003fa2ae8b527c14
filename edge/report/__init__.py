"""Pages of runs: one for each, and one that compares some."""
