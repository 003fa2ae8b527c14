"""The whole model as the device uses it."""
