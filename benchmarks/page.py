"""How long the page takes in a real browser: 16,000 tokens drawn, and a slider moved.

`drawn_ms`: from the last byte of the rollout to the frame with its tokens. `slider_ms`: from a
slider's event to the end of the frame that shows it. Chromium without a window, fake engine, a
made-up recording: no figure here says anything of the teacher.

Run: python -m benchmarks.page [--tokens 16000] [--json runs/bench-page.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from benchmarks.processes import child
from benchmarks.provenance import provenance
from benchmarks.recorded_rollouts import MadeUp, rollout, write_step

VOCAB_SIZE, K = 512, 16
DRAWN_LIMIT_MS, SLIDER_LIMIT_MS = 2000, 100
DRAWN = """
() => new Promise((done) => {
  const arrived = () => performance.getEntriesByType("resource")
    .find((entry) => entry.name.includes("/rollouts/"))?.responseEnd;
  const look = () => {
    if (document.querySelector(".tok.l0, .tok.l5, .tok.l9") && arrived()) {
      requestAnimationFrame(() => setTimeout(() => done(performance.now() - arrived())));
    } else requestAnimationFrame(look);
  };
  look();
})
"""
MOVED = """
([name, moves]) => (async () => {
  const slider = document.querySelector(`input[id$="-${name}"]`);
  const times = [];
  const [low, high] = [Number(slider.min), Number(slider.max)];
  for (let i = 1; i <= moves; i++) {
    const started = performance.now();
    slider.value = String(low + (high - low) * i / moves);
    slider.dispatchEvent(new Event("input", {bubbles: true}));
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    times.push(performance.now() - started);
  }
  return times;
})()
"""


def measured(page: Page, url: str, *, rounds: int, moves: int) -> dict[str, Any]:
    """Times in ms, and what the document is made of."""
    drawn = []
    for _ in range(rounds):
        page.goto("about:blank")
        page.goto(url)
        drawn.append(page.evaluate(DRAWN))
    sliders = {name: page.evaluate(MOVED, [name, moves]) for name in ("threshold", "k", "w_drop")}
    return {
        "drawn_ms": summed_up(drawn),
        "slider_ms": {name: summed_up(times) for name, times in sliders.items()},
        "nodes": page.locator("*").count(),
        "heap_mib": page.evaluate("performance.memory?.usedJSHeapSize ?? 0") / 2**20,
    }


def summed_up(times: list[float]) -> dict[str, float]:
    """Median and maximum."""
    return {"median": round(statistics.median(times), 1), "max": round(max(times), 1)}


def run(num_tokens: int, *, rounds: int, moves: int) -> dict[str, Any]:
    """All figures. Needs Chromium."""
    executable = shutil.which("chromium")
    if executable is None:
        sys.exit("no Chromium: apt-get install -y --no-install-recommends chromium")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = MadeUp(vocab_size=VOCAB_SIZE, k=K)
        row = rollout(made, step=1, index=0, num_tokens=num_tokens, seed=1)
        size = write_step(folder / "runs" / "made", 1, [row]).stat().st_size
        ready = folder / "ready.json"
        command = [sys.executable, "-m", "teacher_server.cli", "serve", "--engine", "fake"]
        command += ["--fake-vocab-size", str(VOCAB_SIZE), "--runs", str(folder / "runs")]
        command += ["--grpc-port", "0", "--http-port", "0", "--ready-file", str(ready)]
        with child("page-server", command) as server:
            asyncio.run(server.until(ready.exists))
            address = json.loads(ready.read_text())["http_address"]
            url = f"http://{address}/#a.run=made&a.step=1&a.index=0"
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"]
                )
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                found = measured(page, url, rounds=rounds, moves=moves)
                found["browser"] = browser.version
                browser.close()
    return {"tokens": num_tokens, "k": K, "file_bytes": size, **found}


def main() -> None:
    """Prints the figures against what they must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--json", type=Path, nargs="?", const=Path("runs/bench-page.json"))
    given = parser.parse_args()
    found = run(given.tokens, rounds=given.rounds, moves=given.moves)
    slowest = max(times["max"] for times in found["slider_ms"].values())
    print(json.dumps(found, indent=2))
    print(f"drawn in {found['drawn_ms']['max']:.0f} ms at most, must be under {DRAWN_LIMIT_MS}")
    print(f"a slider's move in {slowest:.0f} ms at most, must be under {SLIDER_LIMIT_MS}")
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({"made": provenance(), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
