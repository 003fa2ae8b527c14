"""Pages in Chromium: nothing is asked for, nothing goes wrong, nothing is too wide, axe finds nothing serious.

axe-core is not part of the repository: ``npm pack axe-core`` and unpack it; ``DLORA_AXE=…/axe.min.js pytest …`` has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from runs import write_run

from dlora.edge.report.comparison import compare
from dlora.edge.report.comparison_page import comparison_page
from dlora.edge.report.page import run_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind, by name."""
    place = tmp_path_factory.mktemp("pages")
    made = {"run": run_page(write_run(place / "some run" / "of mine", 120))}
    made["short"] = run_page(write_run(place / "short", 1))
    made["none"] = run_page(write_run(place / "none", 0))
    made["comparison"] = comparison_page(compare([write_run(place / "a", 40, lr=0.01), write_run(place / "b", 60)]))
    for name, content in made.items():
        (place / f"{name}.html").write_bytes(content)
    return {name: place / f"{name}.html" for name in made}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["run", "short", "none", "comparison"])
def test_a_page_opens_offline(tab: Page, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    tab.open(pages[name], width=width, dark=dark)
    assert tab.requests == [pages[name].as_uri()]
    assert tab.said == []
    assert tab.run("document.documentElement.scrollWidth") <= width
    plots = tab.run("JSON.parse(document.getElementById('numbers').textContent).plots.length")
    assert tab.run("document.querySelectorAll('.uplot canvas').length") == plots
    # What is folded is read, too.
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert tab.find_barriers() == []


def test_a_page_fits_a_window_that_becomes_narrow(tab: Page, pages: dict[str, Path]) -> None:
    tab.open(pages["run"], width=1280)
    tab.ask("Emulation.setDeviceMetricsOverride", width=390, height=900, deviceScaleFactor=1, mobile=False)
    tab.run("new Promise((done) => setTimeout(done, 300))")
    assert tab.run("document.documentElement.scrollWidth") <= 390
    assert tab.run("document.querySelector('.uplot').getBoundingClientRect().width") <= 390


def point_at(tab: Page, plot: str, part: float) -> None:
    """Move the pointer over a plot, so much of its width from its left."""
    x, y = tab.run(
        f"(() => {{ const plot = document.querySelector('{plot}'); plot.scrollIntoView();"
        f" const box = plot.getBoundingClientRect(); return [box.left + box.width * {part}, box.top + 50]; }})()"
    )
    tab.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tab.run("new Promise((done) => setTimeout(done, 100))")


@pytest.mark.parametrize("name", ["run", "short", "comparison"])
def test_a_legend_has_a_value_wherever_the_pointer_is(tab: Page, pages: dict[str, Path], name: str) -> None:
    """Where there is none at a step, the last one before it, or else the first."""
    tab.open(pages[name], width=1280)
    values = "[...document.querySelectorAll('.u-value')].map((each) => each.textContent)"
    shown = tab.run(values)
    assert shown
    assert not {"–", "--", ""} & set(shown)
    for part in (0.02, 0.3, 0.98):
        point_at(tab, ".u-over", part)
        assert not {"–", "--", ""} & set(tab.run(values))


def test_a_table_that_is_too_wide_for_a_phone_says_that_it_scrolls(tab: Page, pages: dict[str, Path]) -> None:
    hints = (
        "[...document.querySelectorAll('.wide')].filter((box) => box.offsetWidth).map((box) =>"
        " [box.scrollWidth > box.clientWidth, getComputedStyle(box, '::before').content.includes('scrolls sideways')])"
    )
    tab.open(pages["run"], width=390)
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    tab.run("new Promise((done) => setTimeout(done, 100))")
    found = tab.run(hints)
    assert [True, True] in found
    assert [False, False] in found
    assert all(is_wide == says_so for is_wide, says_so in found)
    tab.open(pages["run"], width=1280)
    assert [True, True] not in tab.run(hints)


def test_a_legend_says_what_metrics_jsonl_says(tab: Page, pages: dict[str, Path]) -> None:
    """The numbers under the pointer, of a plot of areas, where what is drawn is a sum and what is said is not."""
    tab.open(pages["run"], width=1280)
    point_at(tab, "#traffic .u-over", 0.5)
    shown = dict(tab.run(
        "[...document.querySelectorAll('#traffic .u-series')].map((row) =>"
        " [row.querySelector('.u-label').textContent, row.querySelector('.u-value').textContent])"
    ))  # fmt: skip
    plot = tab.run(
        "JSON.parse(document.getElementById('numbers').textContent).plots.find((each) => each.id === 'traffic')"
    )
    at = plot["steps"].index(int(shown["step"]))
    for line in plot["series"]:
        assert float(shown[line["label"]]) == pytest.approx(line["values"][at] / 1e6, abs=6e-5), line["label"]
