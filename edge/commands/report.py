"""``dlora-edge report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="The --out of a run.")],
    out: Annotated[Path | None, typer.Option(help="Where to write it; by default report.html in the run.")] = None,
) -> None:
    """Make a run's page again from its files, whether it is done, goes on, or was killed.

    Example:  dlora-edge report my-adapter
    """
    from dlora.edge.files import write_atomically
    from dlora.edge.report.page import run_page
    from dlora.edge.run.file_names import REPORT

    path = out or run / REPORT
    write_atomically(path, run_page(run))
    print(path)
