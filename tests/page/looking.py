"""What a hand does on the page, and what an eye reads there."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, Page, expect

from tests.page.browser import LIMIT_MS
from tests.page.site import Site

ROLLOUT = "#a.run=demo&a.step=1&a.index=0"


def opened(page: Page, shown: Site, link: str = ROLLOUT) -> Locator:
    """The first pane, once what the link names is drawn."""
    page.goto(shown.url + link)
    pane = page.locator(".pane").first
    expect(pane).to_have_attribute("aria-busy", "false", timeout=LIMIT_MS)
    return pane


def stat(pane: Locator, name: str) -> str:
    """A number above the chart."""
    entry = pane.locator(".stats div").filter(has_text=re.compile(f"^{name}"))
    return entry.locator("dd").inner_text()


def slide(pane: Locator, name: str, *keys: str) -> None:
    """Moves a slider as a hand on the keyboard does."""
    slider = pane.locator(f"input[id$='-{name}']")
    for key in keys:
        slider.press(key)


class Counters:
    """The browser's own counts, from here on: layouts, styles."""

    def __init__(self, page: Page) -> None:
        self._session = page.context.new_cdp_session(page)
        self._session.send("Performance.enable")
        self._before = self._all()

    def _all(self) -> dict[str, float]:
        metrics = self._session.send("Performance.getMetrics")["metrics"]
        return {metric["name"]: metric["value"] for metric in metrics}

    def since(self, name: str) -> float:
        """How many there were."""
        return self._all()[name] - self._before[name]


def pasted(page: Page, shown: Site, prompt: str, response: str, *, ids: bool = False) -> Locator:
    """The pane after a form was filled in and sent."""
    pane = opened(page, shown, "#a.paste=1")
    pane.get_by_label("Prompt", exact=True).fill(prompt)
    pane.get_by_label("Response", exact=True).fill(response)
    pane.get_by_label("token ids" if ids else "text", exact=True).check()
    pane.get_by_role("button", name="Analyse").click()
    expect(pane).to_have_attribute("aria-busy", "false", timeout=LIMIT_MS)
    return pane
