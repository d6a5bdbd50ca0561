"""What a link and the way back say of a pasted response, in a real browser.

Run: pytest tests/page/test_paste_links.py (needs Chromium, as test_page.py)
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.page.browser import Watch, browser
from tests.page.looking import opened, pasted, stat
from tests.page.site import Site, site

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def opening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, Site]]:
    """A page and the server that it is of; it does nothing that it may not."""
    with browser() as chromium, site(tmp_path_factory.mktemp("page")) as shown:
        page = chromium.new_page()
        watched = Watch(page, shown.server.http_address)
        yield page, shown
        page.close()
        watched.check()


def test_back_to_a_pasted_text_takes_it_for_text_again(opening: tuple[Page, Site]) -> None:
    page, shown = opening
    pane = pasted(page, shown, "What?", "One word")
    count = stat(pane, "Tokens")
    pane.locator("textarea").nth(0).fill("1 2 3")
    pane.locator("textarea").nth(1).fill("4 5")
    pane.get_by_label("token ids", exact=True).check()
    pane.get_by_role("button", name="Analyse").click()
    expect(pane.locator(".inspector h3")).to_have_text("Token 1 of 2")
    page.go_back()
    expect(pane.locator("textarea").nth(1)).to_have_value("One word")
    expect(pane.get_by_label("text", exact=True)).to_be_checked()
    expect(pane.locator(".inspector h3")).to_have_text(f"Token 1 of {count}")


def test_a_link_to_a_pasted_text_scores_it_as_it_was(opening: tuple[Page, Site]) -> None:
    page, shown = opening
    pane = opened(page, shown, "#a.paste=1")
    pane.get_by_label("Temperature").fill("0.3")
    pane.get_by_label("Top-K").fill("5")
    pane.locator("textarea").nth(0).fill("What?")
    pane.locator("textarea").nth(1).fill("One word")
    pane.get_by_role("button", name="Analyse").click()
    expect(pane.locator(".tokens")).to_be_visible()
    link = page.url
    page.goto("about:blank")
    with page.expect_request("**/v1/analyze") as asked:
        page.goto(link)
    body = asked.value.post_data_json
    assert body is not None
    assert (body["temperature"], body["k"]) == (0.3, 5)
    expect(pane.get_by_label("Temperature")).to_have_value("0.3")
    expect(pane.locator(".tokens")).to_be_visible()
    # Another temperature is another place.
    pane.get_by_label("Temperature").fill("1")
    pane.get_by_role("button", name="Analyse").click()
    page.wait_for_url(re.compile(r"a\.temperature=1"))
    expect(pane).to_have_attribute("aria-busy", "false")
    with page.expect_request("**/v1/analyze") as again:
        page.go_back()
    assert again.value.post_data_json == body
    expect(pane).to_have_attribute("aria-busy", "false")
