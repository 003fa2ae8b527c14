"""Entry point of ``dlora-edge``."""

from dlora.protocol.errors import missing_extra, run_command


def main() -> None:
    """Run ``dlora-edge``; a missing extra is one line."""
    run_command(_main)


def _main() -> None:
    try:
        from .cli import app

        app(prog_name="dlora-edge")
    except ModuleNotFoundError as error:  # the commands load what they need when they run
        if (error.name or "").startswith("dlora"):
            raise
        raise missing_extra(error, "edge") from None


if __name__ == "__main__":
    main()
