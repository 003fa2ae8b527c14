"""The commands of dlora-cloud."""
