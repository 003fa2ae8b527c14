"""Pages are built of elements: text in them is escaped, wherever it comes from."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


NOTHING = Html("")
_VOID = frozenset(("meta", "link", "br"))


def element(tag: str, *parts: object, **attributes: str | int | None) -> Html:
    """An element; what is None is left out, of attributes too. ``class_`` is class, ``data_x`` data-x."""
    names = (
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    opened = f"<{tag}{''.join(names)}>"
    return Html(opened if tag in _VOID else f"{opened}{join(parts)}</{tag}>")


def join(parts: Iterable[object]) -> Html:
    """Parts one after the other; lists among them are parts, too."""
    return Html("".join(map(_render, parts)))


def _render(part: object) -> str:
    if part is None:
        return ""
    if isinstance(part, Html):
        return part
    if isinstance(part, str):
        return html.escape(part, quote=False)
    if isinstance(part, Iterable):
        return join(part)
    raise TypeError(f"{type(part).__name__} in a page: say how it is written")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: bool = True) -> Html:
    """A table in a box that scrolls; the first cell of a row is its heading.

    ``numbers``: whether the other columns have numbers, which stand on the right.
    """
    columns = element("tr", [element("th", each, scope="col") for each in head])
    body = [
        element("tr", element("th", row[0], scope="row"), [element("td", each) for each in row[1:]]) for row in rows
    ]
    made = element(
        "table",
        element("caption", caption),
        element("thead", columns),
        element("tbody", body),
        class_="numbers" if numbers else None,
    )
    return element("div", made, class_="wide", role="region", tabindex=0, aria_label=caption)


def folded(summary: str, *parts: object) -> Html:
    """What is there to be opened."""
    return element("details", element("summary", summary), *parts)


def section(title: str, *parts: object, note: object = None) -> Html:
    """A part of a page, with its heading."""
    return element("section", element("h2", title), element("p", note) if note is not None else None, *parts)
