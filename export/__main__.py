"""Entry point of ``dlora-export``."""

from __future__ import annotations

from dlora.protocol.errors import missing_extra, run_command


def main() -> None:
    """Run ``dlora-export``; a named error becomes one line on stderr and its exit code."""
    run_command(_main)


def _main() -> None:
    try:
        from .cli import app
    except ImportError as error:
        raise missing_extra(error, "export") from None
    app(prog_name="dlora-export")


if __name__ == "__main__":
    main()
