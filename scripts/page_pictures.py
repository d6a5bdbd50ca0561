"""The pictures of docs/page.md: a running server's page in Chromium, light, dark, wide, narrow.

Run: teacher-server serve --engine hf --model examples/playground/checkpoints/teacher --runs runs/
     python -m scripts.page_pictures --url http://127.0.0.1:8080/ --run demo --steps 1 16 --index 4
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "page"
COLOURS = 200
NARROW, USUAL, WIDE = (360, 780), (1280, 900), (2000, 1100)


def pictures(
    page: Page, url: str, run: str, steps: tuple[int, int], index: int, token: int
) -> None:
    """Writes them all."""
    first, last = steps

    def take(name: str, link: str, size: tuple[int, int], scheme: str, above: str = "") -> None:
        page.set_viewport_size({"width": size[0], "height": size[1]})
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        page.goto("about:blank")
        page.goto(f"{url}#{link}")
        page.wait_for_selector(".pane[aria-busy=false]")
        page.wait_for_timeout(300)
        if above:
            page.locator(above).first.scroll_into_view_if_needed()
            page.locator(above).first.evaluate("node => node.scrollIntoView({block: 'start'})")
            page.wait_for_timeout(200)
        path = FOLDER / f"{name}.png"
        page.screenshot(path=path, full_page=not above)
        with Image.open(path) as picture:
            picture.quantize(COLOURS).save(path, optimize=True)

    rollout = f"a.run={run}&a.step={last}&a.index={index}&a.t={token}"
    take("rollout-light", rollout, USUAL, "light")
    take("rollout-narrow-dark", rollout, NARROW, "dark", ".colour-bar")
    take("rollout-dark", f"{rollout}&a.colour=logprob", USUAL, "dark")
    take("step-light", f"a.run={run}&a.step={last}", USUAL, "light")
    beside = f"a.run={run}&a.step={first}&a.index={index}&b.run={run}&b.step={last}&b.index={index}"
    take("wide-steps", beside, WIDE, "light")


def main() -> None:
    """Takes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--steps", type=int, nargs=2, required=True)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--token", type=int, default=0, help="the one that is chosen")
    given = parser.parse_args()
    executable = shutil.which("chromium")
    if executable is None:
        sys.exit("no Chromium: apt-get install -y --no-install-recommends chromium")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        first, last = given.steps
        page = browser.new_page()
        pictures(page, given.url, given.run, (first, last), given.index, given.token)
        browser.close()


if __name__ == "__main__":
    main()
