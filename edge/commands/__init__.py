"""The commands of dlora-edge: what a user types, and what they see."""
