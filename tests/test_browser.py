"""The browser of the tests reports what a page shows and what it complains of."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_a_page_its_values_and_its_picture(browser_page: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<h1>zero</h1><script>setTimeout(() => document.title = 'one', 50)</script>")
    browser_page.open(page)
    assert browser_page.wait_for("document.title") == "one"
    assert browser_page.evaluate("document.querySelector(arguments[0]).innerText", "h1") == "zero"
    browser_page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert browser_page.errors == []


def test_errors_of_scripts_the_console_and_missing_files_are_kept(
    browser_page: Any, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<img src='missing.png'><script>console.error('said')</script>"
        "<script>undefined_name.x</script>"
    )
    browser_page.open(page)
    browser_page.wait_for("document.readyState == 'complete'")
    errors = " ".join(browser_page.errors)
    assert "said" in errors
    assert "undefined_name" in errors
    assert "missing.png" in errors
    assert len(browser_page.errors) == 3  # asking again neither loses nor repeats them
