"""What a curious server can recover: attacks on recorded frames, scored against the truth."""
