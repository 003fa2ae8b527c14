"""The adapters: their parameters, their units, their files."""
