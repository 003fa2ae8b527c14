"""dlora: its parts are ``dlora.edge``, ``dlora.cloud``, ``dlora.export`` and ``dlora.protocol``."""

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    # Looked up when it is asked for: every command loads this file, and importlib.metadata takes its time.
    if name == "__version__":
        from importlib.metadata import version

        return version("dlora")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
