"""Entry point of ``dlora-export``."""

from __future__ import annotations

import signal

from dlora.protocol.errors import INTERRUPTED_EXIT_CODE, missing_extra, run_command


def main() -> None:
    """Run ``dlora-export``; a named error becomes one line on stderr and its exit code."""
    # So that a terminated export clears its half-written bundle away, as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(_main)


def _main() -> None:
    try:
        from .cli import app
    except ImportError as error:
        raise missing_extra(error, "export") from None
    try:
        app(prog_name="dlora-export")
    except SystemExit as ended:
        if ended.code == INTERRUPTED_EXIT_CODE:
            # typer turns Ctrl-C into this code without a word; run_command says what it means.
            raise KeyboardInterrupt from None
        raise


if __name__ == "__main__":
    main()
