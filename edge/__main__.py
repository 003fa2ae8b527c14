"""Entry point of ``dlora-edge``."""

from dlora.protocol.errors import missing_extra, run_command


def main() -> None:
    """Run ``dlora-edge``; a missing extra is one line."""
    run_command(_main)


def _main() -> None:
    try:
        from .cli import app
    except ImportError as error:
        raise missing_extra(error, "edge") from None
    app(prog_name="dlora-edge")


if __name__ == "__main__":
    main()
