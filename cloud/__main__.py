"""Entry point of ``dlora-cloud``."""

from dlora.protocol.command import extra_needed, run_app, run_command


def main() -> None:
    """Run ``dlora-cloud``; a missing extra is one line."""
    run_command(_main)


def _main() -> None:
    with extra_needed("cloud"):
        from dlora.cloud.commands.app import app

        run_app(app, "dlora-cloud")


if __name__ == "__main__":
    main()
