"""Entry point of ``dlora-edge``."""

import sys

from dlora.protocol.command import extra_needed, run_app, run_command


def main() -> None:
    """Run ``dlora-edge``; a missing extra is one line."""
    run_command(_main)


def _main() -> None:
    if sys.argv[1:] == ["--version"]:  # typer and its friends are most of what a small board would load for one line
        from dlora.protocol.version import SOFTWARE_VERSION

        print(f"dlora-edge {SOFTWARE_VERSION}")
        return
    with extra_needed("edge"):
        from dlora.edge.commands.app import app

        run_app(app, "dlora-edge")


if __name__ == "__main__":
    main()
