"""``--record``: keep what crosses, and what must not, for ``dlora-cloud audit``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlora.protocol.errors import UsageError

if TYPE_CHECKING:
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.wire.recorder import Recorder

RecordOption = Annotated[
    Path | None,
    typer.Option(
        "--record",
        metavar="DIR",
        help="Keep the frames of this run as they cross, in DIR/frames, and in DIR/truth the text, labels, adapter and "
        "gradients that must not: for dlora-cloud audit. Off by default; a few --steps are enough.",
    ),
]


@contextmanager
def recording(record: Path | None, bundle: Bundle, warn: Callable[[str], None]) -> Iterator[Recorder | None]:
    """A recording in ``record``, whole when the block ends; None: none. Raises ``UsageError`` and ``StorageError``."""
    if record is None:
        yield None
        return
    from dlora.edge.wire.recorder import Recorder

    with Recorder(record, warn) as recorder:
        warn(
            f"--record: {record} gets this run's text, labels, adapter and gradients, in the clear; only its owner may "
            "read them"
        )
        recorder.add_tokenizer(bundle.file(bundle.manifest.tokenizer.file).read_bytes())
        yield recorder


def check_record(record: Path | None, mode: str | None) -> None:
    """Raise ``UsageError`` where nothing crosses that could be recorded, or there is a recording already."""
    if record is not None and mode == "local":
        raise UsageError("--record keeps what crosses, and with --mode local nothing does: leave it out")
    if record is not None:
        from dlora.edge.wire.recorder import check_directory

        check_directory(record)
