"""A page as one file: what it looks like, its script and its numbers are in it, and it may ask for nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Final

import jinja2
import msgspec

from . import numbers
from .plots import Plot
from .tables import Best, values_table

_FILTERS: Final = (numbers.count, numbers.loss, numbers.mb, numbers.seconds)


def document(template: str, title: str, plots: Sequence[Plot], /, **values: object) -> bytes:
    """The file, as ``assets/<template>.html.j2`` writes it; what strangers wrote is escaped.

    Args:
        plots: those that the template has a place for.
        values: what the template names.
    """
    style = "".join(_read(*path) for path in (("vendor", "uplot", "uPlot.min.css"), ("assets", "page.css")))
    licence = f"/*! uPlot:\n{_read('vendor', 'uplot', 'LICENSE')}*/\n"
    scripts = (licence + _read("vendor", "uplot", "uPlot.iife.min.js"), _read("assets", "page.js"))
    # Nothing may be asked for, and only these very scripts run. Plots set styles of elements from scripts, which no
    # policy forbids.
    sources = f"default-src 'none'; script-src {' '.join(map(_digest, scripts))}; style-src {_digest(style)}"
    data = msgspec.json.encode({"plots": plots}).decode().replace("<", "\\u003c")
    made = _templates().get_template(f"{template}.html.j2")
    return made.render(
        title=title,
        policy=f"{sources}; base-uri 'none'; form-action 'none'",
        style=style,
        scripts=scripts,
        numbers=data,
        **values,
    ).encode()


@functools.cache
def _templates() -> jinja2.Environment:
    """The templates beside the stylesheet: a name that a page was not given is an error, not a gap in it."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _read("assets", name)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({each.__name__: each for each in _FILTERS})
    environment.tests["best"] = lambda cell: isinstance(cell, Best)
    environment.globals["values_table"] = values_table
    return environment


def _read(*path: str) -> str:
    return resources.files(__package__).joinpath(*path).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
