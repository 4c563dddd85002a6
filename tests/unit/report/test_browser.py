"""What a person sees of the page: rendered by headless chromium, at a desk and on a phone, by day and by night."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.browser import EXECUTABLE, Page, browser
from tinysam.report import ReportConfig, write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(EXECUTABLE is None, reason="needs chromium: apt-get install chromium"),
]

MakeLabels = Callable[..., Path]
MakeStages = Callable[[], dict[str, Path]]
EVIL = "<img src=x onerror=document.title='owned'>"
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture
def url(make_labels: MakeLabels, make_stages: MakeStages, tmp_path: Path) -> str:
    images: dict[str, object] = {f"img{i}.png": [0.9, 0.8, 0.7] for i in range(7)}
    images |= {f"a long folder name/{'x' * 60} {EVIL}.png": [0.95], "none.png": []}
    images |= {"bad.png": ("died", f"<script>document.title='owned'</script>{EVIL} {'y' * 300}")}
    out = tmp_path / "report.html"
    stages = tuple(map(str, make_stages().values()))
    write_report(ReportConfig(labels=str(make_labels(images)), stages=stages, output=str(out)))
    return out.as_uri()


def luminance(pixels: np.ndarray) -> np.ndarray:
    """WCAG's relative luminance of (…, 3) uint8."""
    linear = np.where(pixels / 255 <= 0.04045, pixels / 255 / 12.92, ((pixels / 255 + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["day", "night"])
def test_it_fits_the_window_and_can_be_read(page: Page, url: str, size: dict[str, int], dark: bool) -> None:
    page.open(url, **size, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "the page scrolls sideways"
    smallest = """Math.min(...[...document.querySelectorAll('main *')]
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.checkVisibility())
        .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
    assert page.evaluate(smallest) >= 10.5
    top = luminance(page.screenshot())
    background = np.median(top)
    assert background < 0.05 if dark else background > 0.8
    # WCAG asks for a contrast of 4.5; the heading has it, whatever the scheme.
    box = page.evaluate(
        "(r => [r.left, r.top, r.right, r.bottom])(document.querySelector('h1').getBoundingClientRect())"
    )
    left, upper, right, lower = (int(value) for value in box)
    heading = top[upper:lower, left:right]
    assert (heading.max() + 0.05) / (heading.min() + 0.05) > 4.5


def test_it_says_what_the_output_holds_and_runs_no_script_of_a_stranger(page: Page, url: str) -> None:
    page.open(url, **DESK)
    text = page.evaluate("document.body.innerText")
    for expected in (
        "Images labelled\n9\nof 10",
        "Random images",
        "Least certain",
        "No masks found",
        "1 failed",
        "died",
    ):
        assert expected in text
    assert EVIL in text
    assert page.evaluate("document.title") != "owned"
    assert (
        page.evaluate("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    )


def test_its_pictures_are_there_with_masks_that_can_be_taken_off(page: Page, url: str) -> None:
    page.open(url, **DESK)
    broken = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).length"
    assert page.evaluate(broken) == 0
    page.evaluate("document.querySelector('.sheet').scrollIntoView({behavior: 'instant'})")
    where = (
        "(r => [r.left, r.top, r.right, r.bottom])(document.querySelector('.picture .frame').getBoundingClientRect())"
    )
    left, upper, right, lower = (int(value) for value in page.evaluate(where))
    with_masks = page.screenshot()[upper:lower, left:right].astype(int)
    page.evaluate("document.getElementById('show-masks').click()")
    page.evaluate("Promise.all(document.getAnimations().map(animation => animation.finished)).then(() => true)")
    without = page.screenshot()[upper:lower, left:right].astype(int)
    assert without.std() > 20, "the photograph, which is noise, is not to be seen"
    changed = (np.abs(with_masks - without) > 8).any(axis=2).mean()
    assert 0.005 < changed < 0.3, "masks of three small boxes cover a small part"


def test_a_picture_can_be_enlarged_and_put_away(page: Page, url: str) -> None:
    page.open(url, **PHONE)
    page.evaluate("document.querySelector('.picture .frame').click()")
    assert page.evaluate("document.getElementById('enlarged').open")
    width = page.evaluate("document.querySelector('#enlarged .frame img').getBoundingClientRect().width")
    assert 300 < width <= PHONE["width"]
    assert " 1 mask IoU 0.95" in page.evaluate("document.querySelector('#enlarged p').innerText")
    page.evaluate("document.getElementById('enlarged').click()")
    assert not page.evaluate("document.getElementById('enlarged').open")


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_an_evaluations_page_shows_its_tables_and_curves(
    page: Page, make_stages: MakeStages, tmp_path: Path, size: dict[str, int]
) -> None:
    out = tmp_path / "scores.html"
    write_report(ReportConfig(labels=str(make_stages()["scores"]), output=str(out)))
    page.open(out.as_uri(), **size)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    text = page.evaluate("document.body.innerText")
    assert "demo_student" in text
    assert "0.800" in text
    assert page.evaluate("document.querySelectorAll('svg.lines polyline').length") == 2
