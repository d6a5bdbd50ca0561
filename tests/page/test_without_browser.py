"""Where there is no browser, tests of the page are skipped by name, and fail where one is due."""

from __future__ import annotations

import pytest

from tests.page import browser


def test_no_browser_is_a_skip_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "executable", lambda: None)
    monkeypatch.delenv("PAGE_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"apt-get install .* chromium"):
        browser.browser().__enter__()


def test_no_browser_is_a_failure_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "executable", lambda: None)
    monkeypatch.setenv("PAGE_BROWSER", "required")
    with pytest.raises(pytest.fail.Exception, match="no Chromium"):
        browser.browser().__enter__()
