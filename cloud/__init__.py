"""The server: runs the frozen blocks of a base model for devices that keep everything else."""
