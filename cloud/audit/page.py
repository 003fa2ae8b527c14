"""An audit as one HTML file that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, StrictUndefined

from .audit import Audit
from .scoring import Verdict

MEANINGS = {
    Verdict.EXPOSED: "an attack finds nine tenths of it or more",
    Verdict.PARTIAL: "an attack finds some of it, or there is too little in the recording to say that none does",
    Verdict.RESISTED: "the attacks that were tried find hardly more than a guess; others may find more",
    Verdict.BY_CONSTRUCTION: "nothing that crosses is computed from it",
}


def page(audit: Audit) -> str:
    """The HTML. What strangers wrote, texts and names, is escaped."""
    template = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    return environment.from_string(template).render(audit=audit, meanings=MEANINGS, none="nothing there")
