"""Entry point of ``dlora-edge``."""

import sys

from dlora.protocol.errors import missing_extra, run_command


def main() -> None:
    """Run ``dlora-edge``; a missing extra is one line."""
    run_command(_main)


def _main() -> None:
    if sys.argv[1:] == ["--version"]:  # typer and its friends are most of what a small board would load for one line
        from dlora.protocol.version import SOFTWARE_VERSION

        print(f"dlora-edge {SOFTWARE_VERSION}")
        return
    try:
        from .cli import app

        app(prog_name="dlora-edge")
    except ModuleNotFoundError as error:  # the commands load what they need when they run
        if (error.name or "").startswith("dlora"):
            raise
        raise missing_extra(error, "edge") from None


if __name__ == "__main__":
    main()
