"""Entry point of ``dlora-export``."""

from __future__ import annotations

from dlora.protocol.command import extra_needed, run_app, run_command


def main() -> None:
    """Run ``dlora-export``; a named error becomes one line on stderr and its exit code."""
    run_command(_main)


def _main() -> None:
    with extra_needed("export"):
        from .cli import app

        run_app(app, "dlora-export")


if __name__ == "__main__":
    main()
