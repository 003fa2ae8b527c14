"""rich's live line with a view of the run above it; loaded only where there is a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

from .live_view import LEAST_COLUMNS, LEAST_LINES, LiveView


class LiveLine(Progress):
    """How far one thing is, with words beside it; above the line, where the terminal has room and characters for it,
    what ``view`` shows."""

    def __init__(self, name: str, total: int, done: int, stream: TextIO, view: LiveView | None) -> None:
        self._view: LiveView | None = None  # rich asks for what is shown while it is being made
        console = Console(file=stream)
        columns: list[ProgressColumn] = [MofNCompleteColumn(), TextColumn("{task.fields[status]}")]
        if console.width >= 100:  # at 80 the numbers need all of it
            columns.insert(1, BarColumn(bar_width=None))
        super().__init__(*columns, console=console, refresh_per_second=4)
        self._task = self.add_task(name, total=total, completed=done, status=name)
        self._view = view

    def show(self, **changes: Any) -> None:
        """Change what is shown: ``completed``, ``total`` or ``status``, the words."""
        self.update(self._task, **changes)

    def go_on(self, count: int) -> None:
        """So many more are done."""
        self.advance(self._task, count)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Called some times a second, and whenever something is printed above."""
        if self._view is not None and self._has_room():
            colour = self.console.color_system is not None
            for line in self._view.lines(self.console.width - 1, colour=colour):
                yield Text.from_ansi(line, no_wrap=True)
        yield from super().get_renderables()

    def _has_room(self) -> bool:
        console = self.console
        fits = console.width >= LEAST_COLUMNS and console.height >= LEAST_LINES
        return fits and console.encoding.startswith("utf")
