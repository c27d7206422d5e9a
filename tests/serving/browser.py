"""A page in Chromium, used as a person would; the tests and docs/page.py share it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
WIDTHS = {1280: 900, 390: 844}
SECONDS = 50


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """The installed Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A visitor of the page: `tab` notes what the browser complains of and which other servers it asks."""

    def __init__(self, browser: Any, url: str, width: int = 1280, dark: bool = False, scale: float = 1) -> None:
        size = {"width": width, "height": WIDTHS[width]}
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(viewport=size, color_scheme=scheme, device_scale_factor=scale)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(SECONDS * 1000)
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.tab.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        own = (url, url.replace("http", "ws", 1), "data:", "blob:")
        self.tab.on("request", lambda asked: None if asked.url.startswith(own) else self.outside.append(asked.url))
        self.tab.goto(url)
        self.tab.wait_for_selector("button[role=tab]")

    def open(self, name: str) -> None:
        """Go to a tab; on a narrow screen it may stand in the menu of those that have no room."""
        button = self.tab.locator("button[role=tab]:visible", has_text=name)
        if not button.count():
            self.tab.locator(".overflow-menu > button").click()
            button = self.tab.locator(".overflow-dropdown button", has_text=name)
        button.first.click()

    def generate(self, prompt: str, schedule: str = "", n: int = 8) -> None:
        """Ask for a run."""
        self.tab.fill("#pz-prompt textarea", prompt)
        self.tab.fill("#pz-schedule input, #pz-schedule textarea", schedule)
        self.tab.fill("#pz-n input[type=number]", str(n))
        self.tab.click("#pz-generate")

    def drop(self, where: str, clips: Sequence[Path]) -> None:
        """Drop clips into a box, and wait until they are there."""
        self.tab.set_input_files(f"{where} input[type=file]", [str(clip) for clip in clips])
        for clip in clips:
            self.tab.locator(
                f"{where} [aria-label*='{clip.name}'], {where} tr", has_text=clip.stem[:8]
            ).first.wait_for()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.tab.keyboard.press(key)

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.tab.evaluate("document.documentElement.scrollWidth - innerWidth"))
