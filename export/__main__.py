"""The console script ``dlora-export``."""

from __future__ import annotations

from dlora.protocol.errors import missing_extra, run_command


def main() -> None:
    """Run the exporter; a named error becomes one line on stderr and its exit code."""
    run_command(_run)


def _run() -> None:
    try:
        from .cli import app
    except ImportError as error:
        raise missing_extra(error, "export") from None
    app()


if __name__ == "__main__":
    main()
