"""rich's live line with a view of the run above it; loaded only where there is a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import RenderableType
from rich.progress import Progress
from rich.text import Text

from .live_view import LEAST_COLUMNS, LEAST_LINES, LiveView


class ProgressWithView(Progress):
    """A progress line; above it, where the terminal has room and characters for it, what ``view`` shows."""

    def __init__(self, *columns: Any, view: LiveView | None, **settings: Any) -> None:
        self._view: LiveView | None = None  # rich asks for what is shown while it is being made
        super().__init__(*columns, **settings)
        self._view = view

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
