"""Pages in a real headless Chromium, with everything that went wrong in them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Opened:
    """A page and what it complained about."""

    page: Any
    """playwright.sync_api.Page"""
    complaints: list[str] = field(default_factory=list)
    """Console errors and warnings, exceptions, and requests beyond file: and data:."""


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser; skips where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("the program chromium is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, path: Path, width: int = 1280, height: int = 900, **context: Any) -> Iterator[Opened]:
    """A file in a window of that size; `context` goes to playwright's `new_context`."""
    window = browser.new_context(viewport={"width": width, "height": height}, **context)
    try:
        result = Opened(window.new_page())
        page, complaints = result.page, result.complaints
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else complaints.append(request.url),
        )
        page.goto(path.as_uri())
        yield result
    finally:
        window.close()
