"""Which of the ways to run is recommended, and why: by memory, then traffic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from dlora.edge.adapters.peft import LoadedAdapter
from dlora.edge.data.examples import Dataset
from dlora.edge.settings import Settings
from dlora.protocol.errors import UsageError
from dlora.protocol.manifest import Manifest

from .planning import Question, Row, rows_of, settings_for

_WHAT_HELPS: Final = (
    "lower --batch-size or --max-length, or --window to 1, or export with --head-dtype int8, fewer --device-blocks or "
    "--block-dtype int8"
)


@dataclass(frozen=True)
class Recommendation:
    """One row, why it is recommended, and what else may be worth a try; empty: nothing."""

    row: Row
    reason: str
    other: str = ""


def recommend(rows: Sequence[Row]) -> Recommendation | None:
    """The row to take of those that fit; None where none does.

    All blocks here, where they fit: nothing is sent then. Else all on the server, by the kind that sends least. Else
    the most blocks here that fit.
    """
    fitting = [row for row in rows if row.fits]
    here = max((row for row in fitting if row.device_blocks), key=lambda row: row.device_blocks, default=None)
    if here is not None and here.word == "all":
        return Recommendation(here, "nothing is sent, and no server is needed")
    split = min((row for row in fitting if not row.device_blocks), key=lambda row: row.wire_mb, default=None)
    if split is not None:
        other = "" if here is None else (
            f"{here.options} would send {mb(here.wire_mb)}, once, and then need no server; it trains those blocks "
            "alone: compare the two on --eval data of yours"
        )  # fmt: skip
        return Recommendation(split, f"adapters in all parts of the model; {mb(split.wire_mb)} will cross", other)
    if here is not None:
        return Recommendation(here, f"the most blocks that fit; {mb(here.wire_mb)} will cross, once")
    return None


def choose_automatically(
    settings: Settings,
    manifest: Manifest,
    init: LoadedAdapter | None,
    loaded: Sequence[Dataset],
    memory: float,
    say: Callable[[str], None],
) -> Settings:
    """``settings`` with what is recommended in place of ``--device-blocks auto``, which is said in one line.

    Raises ``UsageError`` where nothing fits into ``memory`` bytes, or can be without ``--server``.
    """
    rows = rows_of(Question(settings, manifest, init, loaded, memory))
    if settings.server.server is None:
        rows = [row for row in rows if row.word == "all"]
        if not rows:
            raise UsageError(
                "--device-blocks auto: without --server all blocks must be in the bundle; give the address of one"
            )
    found = recommend(rows)
    if found is None:
        also = " (with --server there are other ways)" if settings.server.server is None else ""
        raise UsageError(f"--device-blocks auto: {why_none(rows, memory)}{also}")
    say(f"where blocks run: {found.row.options} (--device-blocks auto): {found.reason}")
    return settings_for(settings, found.row).replaced(memory=None)


def why_none(rows: Sequence[Row], memory: float) -> str:
    """Why nothing is recommended, and what to do."""
    possible = [row for row in rows if not row.problem]
    if not possible:
        return rows[0].problem
    least = min(possible, key=lambda row: row.peak_mb)
    return (
        f"nothing fits into {memory / 1e6:,.0f} MB of memory: {least.options} takes least, about {least.peak_mb:,.0f} "
        f"MB; {_WHAT_HELPS}"
    )


def mb(amount: float) -> str:
    """An amount of MB for people."""
    return f"{amount:,.{1 if 0 < amount < 10 else 0}f} MB"
