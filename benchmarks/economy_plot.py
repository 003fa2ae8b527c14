"""Curves, as loss against bytes, as one SVG that is readable on a light page and on a dark one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH, LEFT, RIGHT, TOP, PLOT_HEIGHT, LEGEND_LINE = 780, 66, 60, 46, 330, 20
# Apart for eyes that see no red or no green: Okabe and Ito's colours, darker on white and lighter on black.
LIGHT: Final = ("#24292f", "#d55e00", "#0072b2", "#008060", "#b0508f", "#8a6d00", "#3b8bbd", "#7a4a1e")
DARK: Final = ("#e6edf3", "#ff8c42", "#5eb1f2", "#2fc49b", "#e79ac8", "#e5cf3d", "#9bd3f5", "#d3a071")
MARKERS: Final = ("circle", "square", "diamond", "triangle")  # told apart without colours, too
LABEL_WIDTH, LABEL_HEIGHT = 46, 13
STYLE: Final = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif}.title{font-size:15px;font-weight:600}"
    ".value{font-weight:600;paint-order:stroke;stroke-width:4px;stroke-linejoin:round}"
    ".line{fill:none;stroke-width:2}.grid{stroke-width:1}"
)


@dataclass(frozen=True)
class Series:
    """One line: points of (x, y), as bytes and loss in the order of training; the last one is labelled with its y."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Axis:
    """From values to places on the picture, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def place(self, value: float) -> float:
        low, high, value = (math.log(each) if self.is_log else each for each in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.is_log:
            steps = (1, 2, 5) if self.high / self.low < 1000 else (1,)
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        else:
            rough = (self.high - self.low) / 8
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
            found = [step * number for number in range(math.floor(self.low / step), math.ceil(self.high / step) + 1)]
        return [value for value in found if 0.9999 * self.low <= value <= 1.0001 * self.high]


BYTES: Final = "bytes on the wire since the run began, both ways"


def plot(title: str, series: Sequence[Series], y_title: str, x_title: str = BYTES) -> str:
    """The picture. All values must be above 0; there must be a series."""
    bottom, middle = TOP + PLOT_HEIGHT, TOP + PLOT_HEIGHT / 2
    legend_top = bottom + 62
    height = legend_top + LEGEND_LINE * -(-len(series) // 2)
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points]
    x_axis = Axis(min(xs) / 1.3, max(xs) * 1.3, LEFT, WIDTH - RIGHT, True)
    is_log = max(ys) > 6 * min(ys)
    room = 0.06 * ((max(ys) - min(ys)) or max(ys))
    low, high = (min(ys) / 1.3, max(ys) * 1.2) if is_log else (max(min(ys) - room, 1e-9), max(ys) + room)
    y_axis = Axis(low, high, bottom, TOP, is_log)
    colours = _colours(len(series), LIGHT, "#ffffff", "#24292f", "#d8dee4")
    dark = _colours(len(series), DARK, "#0d1117", "#e6edf3", "#30363d")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}{colours}@media(prefers-color-scheme:dark){{{dark}}}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>',
        *_grid(x_axis, y_axis, _bytes_text if x_title == BYTES else "{:g}".format),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 38}" text-anchor="middle">'
        f"{escape(x_title)} (log scale)</text>",
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">'
        f"{escape(y_title)}{' (log scale)' if is_log else ''}</text>",
    ]
    taken: list[tuple[float, float]] = []
    labels: list[str] = []  # over all lines
    for index, each in enumerate(series):
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in each.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line l{index}" points="{path}"/>')
        parts += [_marker(index, x, y, 3.0) for x, y in places[:-1]]
        parts.append(_marker(index, *places[-1], 5.0))
        taken.append(_free_place(places[-1], taken))
        (x, y), loss = taken[-1], each.points[-1][1]
        value = f"{loss:.2f}" if loss >= 1 else f"{loss:.3f}"
        labels.append(f'<text class="m{index} value" x="{x:.1f}" y="{y + 4:.1f}">{value}</text>')
        x, y = LEFT + (index % 2) * (WIDTH - LEFT) / 2, legend_top + LEGEND_LINE * (index // 2)
        parts.append(f'<line class="line l{index}" x1="{x}" y1="{y - 4}" x2="{x + 22}" y2="{y - 4}"/>')
        parts += [_marker(index, x + 11, y - 4, 4.0), f'<text x="{x + 30}" y="{y}">{escape(each.name)}</text>']
    return "\n".join([*parts, *labels, "</svg>"]) + "\n"


def _colours(count: int, palette: Sequence[str], page: str, text: str, grid: str) -> str:
    found = f".page{{fill:{page}}}text{{fill:{text}}}.grid{{stroke:{grid}}}.value{{stroke:{page}}}"
    for index in range(count):
        colour = palette[index % len(palette)]
        found += f".l{index}{{stroke:{colour}}}.m{index}{{fill:{colour}}}"
    return found


def _grid(x_axis: Axis, y_axis: Axis, x_text: Callable[[float], str]) -> Iterator[str]:
    left, right, bottom, top = (f"{each:.1f}" for each in (x_axis.start, x_axis.end, y_axis.start, y_axis.end))
    for value in x_axis.ticks():
        x = f"{x_axis.place(value):.1f}"
        yield f'<line class="grid" x1="{x}" y1="{top}" x2="{x}" y2="{bottom}"/>'
        yield f'<text x="{x}" y="{y_axis.start + 17:.1f}" text-anchor="middle">{x_text(value)}</text>'
    for value in y_axis.ticks():
        y = y_axis.place(value)
        yield f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
        yield f'<text x="{x_axis.start - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'


def _marker(index: int, x: float, y: float, size: float) -> str:
    match MARKERS[index % len(MARKERS)]:
        case "circle":
            return f'<circle class="m{index}" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
        case "square":
            corner = f'x="{x - size:.1f}" y="{y - size:.1f}"'
            return f'<rect class="m{index}" {corner} width="{2 * size:.1f}" height="{2 * size:.1f}"/>'
        case "diamond":
            corners = [(x, y - 1.3 * size), (x + 1.3 * size, y), (x, y + 1.3 * size), (x - 1.3 * size, y)]
        case _:
            corners = [(x, y - 1.3 * size), (x + 1.2 * size, y + size), (x - 1.2 * size, y + size)]
    points = " ".join(f"{one:.1f},{other:.1f}" for one, other in corners)
    return f'<polygon class="m{index}" points="{points}"/>'


def _free_place(end: tuple[float, float], taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where a label goes: right of its point, or as little above or below that as leaves the others readable."""
    x = end[0] + 10
    for distance in range(0, 200, 2):
        for y in (end[1] - distance, end[1] + distance):
            if all(abs(x - left) >= LABEL_WIDTH or abs(y - other) >= LABEL_HEIGHT for left, other in taken):
                return x, y
    return x, end[1]


def _bytes_text(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.999 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} B"
