"""A page as one file: what it looks like, its script and its numbers are in it, and it may ask for nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

import msgspec

from .html import Html, element
from .plots import Plot


def document(title: str, plots: Sequence[Plot], *parts: object) -> bytes:
    """The file. ``parts`` have a place for each plot; what strangers wrote is escaped."""
    style = "".join(_read(*path) for path in (("vendor", "uplot", "uPlot.min.css"), ("assets", "page.css")))
    licence = f"/*! uPlot:\n{_read('vendor', 'uplot', 'LICENSE')}*/\n"
    scripts = (licence + _read("vendor", "uplot", "uPlot.iife.min.js"), _read("assets", "page.js"))
    # Nothing may be asked for, and only these very scripts run. Plots set styles of elements from scripts, which no
    # policy forbids.
    allowed = " ".join(map(_digest, scripts))
    sources = f"default-src 'none'; script-src {allowed}; style-src {_digest(style)}"
    policy = f"{sources}; base-uri 'none'; form-action 'none'"
    numbers = msgspec.json.encode({"plots": plots}).decode().replace("<", "\\u003c")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", Html(style)),
    )
    body = element(
        "body",
        element("main", *parts),
        element("script", Html(numbers), id="numbers", type="application/json"),
        *(element("script", Html(script)) for script in scripts),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n".encode()


def plot_place(plot: Plot, *, tall: bool = False) -> Html:
    """Where a plot is drawn."""
    label = f"Plot of {plot.title.lower()}, {plot.y} over {plot.x}s; the table below it has numbers"
    return element("div", id=plot.id, class_="plot tall" if tall else "plot", role="img", aria_label=label)


def without_script() -> Html:
    """What is said where no script runs."""
    return element("noscript", element("p", "Plots need JavaScript; the tables have the numbers.", class_="noscript"))


def _read(*path: str) -> str:
    return resources.files(__package__).joinpath(*path).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
