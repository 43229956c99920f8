"""A real headless browser: Chromium or Chrome, driven by Selenium through chromedriver.

`browser()` skips the test, with the reason, where one of the three is missing. On Debian they are
the packages `chromium` and `chromium-driver`, and `selenium` of the extra `dev`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import PATIENCE_S

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Page:
    """One browser window, and everything that it complained of."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        """Selenium's, for whatever is not here."""
        self._errors: list[str] = []

    def open(self, url: str | Path) -> None:
        """Load a page, by its URL or from a file, and wait for its `load` event."""
        self.driver.get(url.resolve().as_uri() if isinstance(url, Path) else url)

    def evaluate(self, expression: str, *arguments: Any) -> Any:
        """Return what a JavaScript expression is worth; `arguments[0]` is the first argument."""
        return self.driver.execute_script(f"return ({expression})", *arguments)

    def wait_for(self, expression: str, *arguments: Any, timeout_s: float = PATIENCE_S) -> Any:
        """Return the first value of a JavaScript expression that is true; see `evaluate`.

        Raises:
            selenium.common.TimeoutException: there was none in time.
        """
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, timeout_s, poll_frequency=0.1)
        return wait.until(
            lambda _: self.evaluate(expression, *arguments), f"never true: {expression}"
        )

    @property
    def errors(self) -> list[str]:
        """All errors since the window was opened: the console's, uncaught ones, failed loads."""
        log = self.driver.get_log("browser")  # hands each entry out once
        self._errors += [entry["message"] for entry in log if entry["level"] == "SEVERE"]
        return self._errors

    def resize(self, width: int, height: int) -> None:
        """Make the part of the window that shows the page so large, in CSS pixels."""
        # Not by emulated device metrics: canvases are then drawn with a stripe at their left.
        self.driver.set_window_size(width, height)
        frame = [width, height]
        frame[0] += width - self.evaluate("window.innerWidth")
        frame[1] += height - self.evaluate("window.innerHeight")
        self.driver.set_window_size(*frame)

    def screenshot(self, path: Path) -> None:
        """Write the whole page, also what is below the window's edge, as PNG."""
        width, height = self.evaluate("[window.innerWidth, window.innerHeight]")
        self.resize(width, max(height, self.evaluate("document.documentElement.scrollHeight")))
        self.driver.save_screenshot(str(path))
        self.resize(width, height)


@contextmanager
def browser(width: int = 1280, height: int = 900) -> Iterator[Page]:
    """Open a window with a fresh profile; the browser ends with the block."""
    binary = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium with chromedriver on the PATH")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # A container's /dev/shm is small, and its root may not make Chromium's sandbox.
    flags = ["--headless=new", "--disable-dev-shm-usage", "--disable-gpu"]
    for flag in flags + ["--no-sandbox"] * (os.geteuid() == 0):
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=driver)
    with webdriver.Chrome(options=options, service=service) as window:
        page = Page(window)
        page.resize(width, height)
        yield page
