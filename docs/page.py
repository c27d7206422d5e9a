"""Take the pictures of docs/page.md: ``python docs/page.py``, some minutes, needs Chromium, gradio and playwright.

Every tab of the page of the embedded model as a person would see it, at 1280 and 390 pixels, light and dark.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.serving import browser  # noqa: E402
from tests.serving.browser import Visit, chromium  # noqa: E402

from prism.commands.page import Annotating, Page, started  # noqa: E402

browser.SECONDS = 300  # runs of a busy machine
OUT = ROOT / "docs" / "page"
PROMPT = "a green triangle moves up"


def main() -> None:
    """Write docs/page/*.png."""
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chromium() as opened:
        os.chdir(folder)  # the page shows where a run lies: no path of this machine
        pairs = Annotating(dimensions="VQ,MQ,TA", pairs_per_prompt=1)
        server, jobs = started(Page(out=Path("runs"), port=0, annotate=pairs))
        try:
            wide = Visit(opened, server.url)
            _generate(wide)
            _annotate(wide)
            clips = sorted((Path(folder) / "runs").glob("*/winner.mp4"))
            _narrow(Visit(opened, server.url, 390, dark=True, scale=1.5), clips[0])
            dark = Visit(opened, server.url, dark=True)
            _score(dark, clips)
            _compare(dark, clips)
        finally:
            server.stop()
            jobs.close()


def _generate(visit: Visit) -> None:
    tab = visit.tab
    visit.generate(PROMPT, "4:3,6:1")
    tab.wait_for_selector(".pz-winner video")
    tab.wait_for_timeout(2500)
    _shot(visit, "generate")
    visit.generate("a red circle moves left", "4:1", 4)
    tab.wait_for_selector(".pz-head[data-run^='0002'] .done")


def _annotate(visit: Visit) -> None:
    visit.open("Annotate")
    visit.tab.fill("#pz-name input, #pz-name textarea", "Ada")
    visit.tab.click("#pz-start")
    for number in range(1, 5):
        visit.tab.wait_for_function(
            "n => document.querySelector('#pz-board .pz-foot')?.innerText.includes(n)", arg=f"{number} of"
        )
        visit.press("ArrowLeft", "ArrowDown", *(["ArrowRight", "Enter"] if number < 4 else []))
    visit.tab.wait_for_timeout(1200)
    _shot(visit, "annotate")


def _score(visit: Visit, clips: list[Path]) -> None:
    visit.open("Score")
    visit.drop("#pz-clips", clips[:1])
    visit.tab.fill("#pz-asked textarea", PROMPT)
    visit.tab.click("#pz-score")
    visit.tab.wait_for_selector(".pz-clip img")
    visit.tab.wait_for_timeout(1200)
    _shot(visit, "score-dark")


def _compare(visit: Visit, clips: list[Path]) -> None:
    visit.open("Compare")
    visit.drop("#pz-left", clips[:1])
    visit.drop("#pz-right", clips[1:2])
    visit.tab.fill("#pz-both input, #pz-both textarea", PROMPT)
    visit.tab.click("#pz-compare")
    visit.tab.wait_for_selector("#pz-pair .pz-stage")
    visit.press(*["ArrowLeft"] * 4, "Enter")
    visit.tab.wait_for_selector("#pz-verdict table")
    visit.tab.wait_for_timeout(1200)
    _shot(visit, "compare-dark")


def _narrow(visit: Visit, clip: Path) -> None:
    """The run of before and a pair, on a telephone."""
    visit.tab.click("#pz-runs button >> nth=-1")
    visit.tab.wait_for_selector(".pz-winner video")
    visit.tab.wait_for_timeout(1500)
    visit.tab.locator("#pz-head").scroll_into_view_if_needed()
    visit.tab.evaluate("document.querySelector('#pz-head').scrollIntoView()")
    visit.tab.screenshot(path=OUT / "generate-narrow.png")
    visit.tab.evaluate("scrollTo(0, 0)")
    visit.open("Annotate")
    visit.tab.fill("#pz-name input, #pz-name textarea", "Bo")
    visit.tab.click("#pz-start")
    visit.tab.wait_for_selector("#pz-board .pz-stage")
    visit.press("ArrowLeft")
    visit.tab.wait_for_timeout(1500)
    visit.tab.evaluate("document.querySelector('#pz-board').scrollIntoView()")
    visit.tab.screenshot(path=OUT / "annotate-narrow.png")


def _shot(visit: Visit, name: str) -> None:
    visit.tab.screenshot(path=OUT / f"{name}.png", full_page=True)
    assert not visit.errors, visit.errors
    assert not visit.outside, visit.outside


if __name__ == "__main__":
    main()
    from PIL import Image

    for path in sorted(OUT.glob("*.png")):  # a page has few colours: a palette halves its size
        Image.open(path).convert("RGB").quantize(160, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")
