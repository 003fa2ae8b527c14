"""Which of the ways to run is recommended, and why: by memory, then what is known of quality, then traffic.

Speed decides nothing, so that ``--mode auto`` is the same whatever else this machine does at the moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from dlora.edge.run.run_file import RunSettings
from dlora.protocol.errors import UsageError
from dlora.protocol.manifest import Manifest

from .planning import Question, Row, rows_of, settings_for

if TYPE_CHECKING:
    from dlora.edge.adapters.peft import LoadedAdapter
    from dlora.edge.data.examples import Dataset

_LESS: Final = 0.5  # of the traffic, or the minutes, of what is recommended: worth a word
_WHAT_HELPS: Final = (
    "lower --batch-size or --max-length, or export with --head-dtype int8, fewer --device-blocks or --block-dtype int8"
)


@dataclass(frozen=True)
class Recommendation:
    """One row, why it is recommended, and what else may be worth a try."""

    row: Row
    reason: str
    others: tuple[str, ...] = ()


def recommend(rows: Sequence[Row]) -> Recommendation | None:
    """The row to take of those that fit; None where none does."""
    fitting = [row for row in rows if row.fits]
    good = [row for row in fitting if row.holds]
    if good:
        chosen = min(good, key=lambda row: (row.wire_mb, row.peak_mb))
        reason = "nothing is sent" if chosen.mode == "local" else f"{mb(chosen.wire_mb)} will cross"
        if chosen.mode == "trunk":
            reason += ", once, and then no server is needed"
        if chosen.mode == "split" and len(good) > 1:
            reason += ", the least of what was measured and fits"
        return Recommendation(chosen, f"{chosen.quality}; {reason}", _others(chosen, fitting))
    if not fitting:
        return None
    chosen = max(fitting, key=lambda row: (row.device_blocks, -row.wire_mb))
    return Recommendation(
        chosen, f"nothing that was measured fits here; of what does it has the most blocks; quality: {chosen.quality}"
    )


def _others(chosen: Row, fitting: Sequence[Row]) -> tuple[str, ...]:
    found = []
    unknown = [row for row in fitting if not row.holds and row.wire_mb < _LESS * chosen.wire_mb]
    if unknown:
        other = max(unknown, key=lambda row: row.device_blocks)
        found.append(
            f"{other.options} would send {mb(other.wire_mb)}, once, and then need no server; its quality is "
            f"{other.quality}: compare the two on --eval data of yours"
        )
    quick = [row for row in fitting if row.holds and row.minutes is not None and chosen.minutes is not None]
    if quick and chosen.minutes is not None:
        other = min(quick, key=lambda row: row.minutes or 0.0)
        if other.minutes is not None and other.minutes < _LESS * chosen.minutes:
            found.append(
                f"{other.options} would take about {minutes(other.minutes)} in place of {minutes(chosen.minutes)}, and "
                f"send {mb(other.wire_mb)}"
            )
    return tuple(found)


def choose_mode(
    settings: RunSettings,
    manifest: Manifest,
    init: LoadedAdapter | None,
    loaded: Sequence[Dataset],
    memory: float,
    say: Callable[[str], None],
) -> RunSettings:
    """``settings`` with what is recommended in place of the mode ``auto``, which is said in one line.

    Raises ``UsageError`` where nothing fits into ``memory`` bytes, or can be without ``--server``.
    """
    rows = rows_of(Question(settings, manifest, init, loaded, memory))
    if settings.server is None:
        rows = [row for row in rows if row.mode == "local"]
        if not rows:
            raise UsageError("--mode auto: without --server all blocks must be in the bundle; give the address of one")
    found = recommend(rows)
    if found is None:
        also = " (with --server there are other modes)" if settings.server is None else ""
        raise UsageError(f"--mode auto: {why_none(rows, memory)}{also}")
    row = found.row
    say(f"mode: {row.options} (--mode auto): {found.reason}")
    chosen = settings_for(settings, row.mode, row.kind, row.device_blocks)
    if row.mode == "split":
        chosen = msgspec.structs.replace(chosen, device_blocks=None)
    return chosen


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


def minutes(amount: float) -> str:
    """A time for people."""
    if amount < 1:
        return f"{max(1, round(60 * amount))} s"
    return f"{amount:.0f} min" if amount < 120 else f"{amount / 60:.1f} h"
