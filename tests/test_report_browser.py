"""The report in a real browser: it fits, it is readable, its videos play, and it asks nobody for anything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from algos.zoo import ZOO
from benchmarks.report import write_report
from tests import chromium
from tests.synthetic_runs import write_benchmark, write_run

pytestmark = pytest.mark.skipif(
    chromium.find() is None, reason=f"no browser; install one of {', '.join(chromium.NAMES)}"
)
WIDTHS = (1280, 390)
# Texts of the drawings that are shown at this width, with their boxes.
TEXTS = """
[...document.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width).map(svg =>
  [...svg.querySelectorAll('text')].map(text => { const b = text.getBoundingClientRect();
    return [text.textContent, b.left, b.top, b.right, b.bottom]; }))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    root = tmp_path_factory.mktemp("runs") / "bench"
    labels = [*list(ZOO)[:8], "vader with K=10 and all frames"]
    for index, name in enumerate(labels):
        write_run(root, name, gain=0.4 - 0.01 * index, full=True, queries=10 * (index + 1), evaluations=3)
    write_benchmark(root, labels, hypothesis="vader is ahead", expected_ahead=[["vader", "ddpo"]])
    path = write_report(root)
    program = chromium.find()
    assert program is not None
    with chromium.browser(program, tmp_path_factory.mktemp("profile")) as tab:
        tab.size(1280, 900)
        tab.open(path.as_uri())
        yield tab


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_never_wider_than_its_window(page: chromium.Page, width: int) -> None:
    page.size(width, 800, mobile=width < 600)
    assert page.evaluate("window.innerWidth") == width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('svg') && "
        f"!e.closest('pre') && e.getBoundingClientRect().right > {width} + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []


@pytest.mark.parametrize("width", WIDTHS)
def test_texts_of_figures_stay_apart_inside_and_large_enough(page: chromium.Page, width: int) -> None:
    page.size(width, 800, mobile=width < 600)
    drawings = page.evaluate(TEXTS)
    assert len(drawings) >= 12
    for texts in drawings:
        for index, (text, left, top, right, bottom) in enumerate(texts):
            assert 0 <= left and right <= width + 1, (text, left, right)
            assert bottom - top >= 8, (text, bottom - top)
            for other, l2, t2, r2, b2 in texts[index + 1 :]:
                across, down = min(right, r2) - max(left, l2), min(bottom, b2) - max(top, t2)
                # Lines of one label touch; words on top of each other share more than that.
                assert across < 2 or down < 0.35 * min(bottom - top, b2 - t2) or "untrained" in text + other, (
                    text,
                    other,
                )


def test_videos_have_a_size_and_play(page: chromium.Page) -> None:
    page.size(1280, 900)
    page.wait("[...document.querySelectorAll('video')].every(video => video.readyState >= 2)")
    sizes = page.evaluate("[...document.querySelectorAll('video')].map(v => [v.videoWidth, v.clientWidth, v.duration])")
    assert len(sizes) == 3 * 10 and all(min(size) > 0 for size in sizes)
    # Those out of sight may wait; the ones that are looked at play.
    page.evaluate("document.querySelector('video').scrollIntoView()")
    page.wait("document.querySelector('video').currentTime > 0 && !document.querySelector('video').paused")


def test_nothing_is_asked_for_over_the_network(page: chromium.Page) -> None:
    names = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in names if not name.startswith("data:")] == []
    assert page.evaluate("document.scripts.length") == 0
