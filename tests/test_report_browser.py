"""The report in a real browser: what a person sees, clicks, sorts and swipes."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, opened
from tiny_report import LAYERS, write_results

from cosa_fast.report import make_report

TEXT = (
    ("ink", "page"), ("muted", "page"), ("accent", "page"), ("ink", "card"), ("muted", "card"), ("ink", "tint"),
    ("on-accent", "accent"), ("note-ink", "note"),
)  # fmt: skip
"""Colours of text and of what is behind it."""
CURVES = (("s1", "page"), ("s2", "page"), ("s3", "page"), ("s4", "page"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def path(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the full folder."""
    folder = tmp_path_factory.mktemp("report")
    make_report(write_results(folder / "results"), folder / "report.html")
    return folder / "report.html"


SHOWN = "() => { const i = document.querySelector('.picture'); return i.complete && i.naturalWidth > 0 && i.src; }"


def test_the_browser_has_no_complaints_and_shows_every_image(browser: Any, path: Path) -> None:
    with opened(browser, path) as window:
        page = window.page
        page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        page.evaluate("document.querySelectorAll('.sample').forEach((part) => { part.hidden = false; })")
        broken = "() => [...document.images].filter((i) => !i.complete || !i.naturalWidth).map((i) => i.alt)"
        page.wait_for_function(f"({broken})().length === 0")
        assert page.evaluate("document.images.length") == 3 * len(LAYERS) + 2 + 1
        assert page.evaluate("document.querySelectorAll('.chart svg polyline').length") > 8
        assert window.complaints == []


def test_sorting_reorders_by_number_with_empty_cells_last(browser: Any, path: Path) -> None:
    with opened(browser, path) as window:
        page = window.page
        names = (
            "() => [...document.querySelectorAll('.split:not([hidden]) tbody.rows th')].map((cell) => cell.textContent)"
        )
        original = ["background", "bird", "cat", "cow"]
        assert page.evaluate(names) == original
        head = page.locator(".split:not([hidden]) thead th").nth(1)
        for order, state in (
            (["background", "cow", "bird", "cat"], "descending"),
            (["bird", "cow", "background", "cat"], "ascending"),
            (original, "none"),
        ):
            head.locator("button").click()
            assert page.evaluate(names) == order
            assert head.get_attribute("aria-sort") == state
        page.locator(".split:not([hidden]) thead th").first.locator("button").press("Enter")
        page.keyboard.press("Enter")
        assert page.evaluate(names) == ["cow", "cat", "bird", "background"]
        pinned = page.locator(".split:not([hidden]) tbody").first
        assert pinned.inner_text().startswith("Mean")
        page.select_option("#split", label="test")
        assert page.locator(".split:not([hidden]) figcaption").inner_text().endswith("MiniVOC test")
        assert page.evaluate(names) == original
        assert window.complaints == []


def test_flipping_through_images_and_layers(browser: Any, path: Path) -> None:
    with opened(browser, path) as window:
        page = window.page
        page.locator(".viewer").scroll_into_view_if_needed()

        def shown() -> tuple[str, str]:
            page.wait_for_function(SHOWN)
            return page.evaluate(SHOWN), page.locator(".picture").get_attribute("alt")

        seen = set()
        for layer in LAYERS:
            page.locator(".layers button", has_text=re.compile(f"^{layer}")).first.click()
            picture, label = shown()
            assert label == f"{layer} of val_0"
            seen.add(picture)
        assert len(seen) == len(LAYERS)
        page.locator(".next").click()
        assert shown()[1] == "error of val_1"
        assert shown()[0] not in seen
        assert page.locator(".sample:visible h3").inner_text() == "val_1 · mIoU of this image 50.0\N{NO-BREAK SPACE}%"
        page.keyboard.press("ArrowRight")
        assert shown()[1] == "error of val_2"
        page.keyboard.press("ArrowRight")  # round again
        assert shown()[1] == "error of val_0"
        page.keyboard.press("ArrowLeft")
        assert shown()[1] == "error of val_2"
        page.keyboard.press("3")
        assert shown()[1] == "CAM pseudo-label of val_2"
        assert page.locator(".layers [aria-pressed=true]").get_attribute("data-layer") == "CAM pseudo-label"
        page.locator(".sample:visible .strip li").first.click()
        assert shown()[1] == "image of val_2"
        page.select_option("#tag", "cat")
        assert shown()[1] == "image of val_1"
        assert page.locator(".place").inner_text() == "1 of 1"
        chips = page.locator(".sample:visible .chips li").all_inner_texts()
        assert [re.sub(r"\s+", " ", chip) for chip in chips] == ["cat tag", "background"]
        assert window.complaints == []


def test_a_phone_scrolls_only_downwards_and_swipes(browser: Any, path: Path) -> None:
    with opened(browser, path, 390, 844, has_touch=True, is_mobile=True) as window:
        page = window.page
        page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("visualViewport.scale") == 1
        sizes = page.evaluate(
            "[...document.querySelectorAll('.viewer button, .sort')].filter((b) => b.checkVisibility())"
            ".map((b) => b.getBoundingClientRect().height)"
        )
        assert min(sizes) >= 44
        page.evaluate("document.querySelector('.viewer').scrollIntoView()")
        reach = page.evaluate("document.querySelector('.next').getBoundingClientRect().bottom")
        assert reach <= 844  # picture and buttons fit together
        page.evaluate(
            """() => {
              const stage = document.querySelector(".stage");
              const touch = (x) => new Touch({ identifier: 1, target: stage, clientX: x, clientY: 300 });
              const swipe = (type, touches, changedTouches) =>
                stage.dispatchEvent(new TouchEvent(type, { touches, changedTouches }));
              swipe("touchstart", [touch(300)], [touch(300)]);
              swipe("touchend", [], [touch(120)]);
            }"""
        )
        assert page.locator(".picture").get_attribute("alt") == "image of val_1"
        assert window.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(browser: Any, path: Path, scheme: str) -> None:
    """WCAG AA: 4.5 to 1 for text, 3 to 1 for curves."""
    with opened(browser, path, color_scheme=scheme) as window:
        colours = window.page.evaluate(
            "(names) => { const style = getComputedStyle(document.documentElement);"
            " return Object.fromEntries(names.map((name) => [name, style.getPropertyValue('--' + name).trim()])); }",
            [*{name for pair in (*TEXT, *CURVES) for name in pair}],
        )
        body = window.page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(int(part) for part in re.findall(r"\d+", body)[:3]) < 200
    assert dark == (scheme == "dark")
    for front, back in TEXT:
        assert _contrast(colours[front], colours[back]) >= 4.5, (front, back)
    for front, back in CURVES:
        assert _contrast(colours[front], colours[back]) >= 3, (front, back)


def _contrast(one: str, other: str) -> float:
    """Contrast ratio of two #rrggbb colours (WCAG 2)."""

    def luminance(colour: str) -> float:
        parts = [value / 255 for value in bytes.fromhex(colour.removeprefix("#"))]
        red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_it_works_inside_another_page_and_without_its_script(browser: Any, path: Path) -> None:
    """As Snakemake's report embeds it: in a frame, from a data address."""
    frame = path.with_name("frame.html")
    source = "data:text/html;base64," + base64.b64encode(path.read_bytes()).decode()
    frame.write_text(f'<iframe src="{source}" width="1000" height="800"></iframe>')
    with opened(browser, frame) as window:
        inner = window.page.frames[1]
        inner.wait_for_selector(".layers button")
        inner.locator(".next").click()
        assert inner.locator(".picture").get_attribute("alt") == "image of val_1"
        inner.locator("nav a").last.click()
        inner.wait_for_function("() => document.querySelector('#versions').getBoundingClientRect().top < innerHeight")
        assert window.complaints == []
    with opened(browser, path, java_script_enabled=False) as window:
        assert window.page.locator(".strip img:visible").count() == 3 * len(LAYERS)
        assert window.page.locator(".viewer, select").filter(visible=True).count() == 0
