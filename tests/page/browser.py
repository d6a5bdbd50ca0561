"""Debian's Chromium, and what a page may not do while it is driven.

Playwright drives it and downloads nothing. Without a browser the tests are skipped by name; where
PAGE_BROWSER is "required", as in CI, that is a failure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

INSTALL = "apt-get install -y --no-install-recommends chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome")
LIMIT_MS = 120_000.0
"""For a hang, as in tests.waiting."""
REFUSED_SILENTLY = "Failed to load resource"
"""What the browser itself writes to the console where a server refuses; tests of refusals expect
it."""


def executable() -> str | None:
    """Where a browser is."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """One browser without a window; skips the test, or fails it, where there is none."""
    path = executable()
    if path is None:
        message = f"no Chromium on this machine: {INSTALL}"
        if os.environ.get("PAGE_BROWSER") == "required":
            pytest.fail(message)
        pytest.skip(message)
    expect.set_options(timeout=LIMIT_MS)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield started
        finally:
            started.close()


class Watch:
    """What a page did that none may do."""

    def __init__(self, page: Page, host: str) -> None:
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.may_be_refused = False
        self._host = host
        page.set_default_timeout(LIMIT_MS)
        page.set_default_navigation_timeout(LIMIT_MS)
        page.on("console", lambda message: self._on_console(message.type, message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._on_request(request.url))

    def _on_console(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not (self.may_be_refused and REFUSED_SILENTLY in text):
            self.complaints.append(f"{kind}: {text}")

    def _on_request(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.netloc != self._host:
            self.elsewhere.append(url)

    def check(self) -> None:
        """Nothing on the console, no request to another host."""
        assert (self.complaints, self.elsewhere) == ([], [])
