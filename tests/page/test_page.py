"""The page in a real browser: what people see, do and take along.

Run: pytest tests/page (needs Chromium: apt-get install -y --no-install-recommends chromium)
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from benchmarks.recorded_rollouts import POLICY
from teacher_wire.drift import bad_event_budget, reliability
from teacher_wire.drift_metrics import (
    OverlapRatio,
    TeacherTopPAccept,
    overlap_counts,
    slow_outside_nucleus,
)
from tests.page.browser import Watch, browser
from tests.page.looking import ROLLOUT, Counters, opened, pasted, slide, stat
from tests.page.site import LENGTHS, LONG, Site, site

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def shown(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    del chromium  # without a browser no server is started
    with site(tmp_path_factory.mktemp("page")) as started:
        yield started


@pytest.fixture
def watch(chromium: Browser, shown: Site) -> Iterator[tuple[Page, Watch]]:
    """A page, and what it does; nothing that it may not."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    watched = Watch(page, shown.server.http_address)
    yield page, watched
    context.close()
    watched.check()


@pytest.fixture
def page(watch: tuple[Page, Watch]) -> Page:
    return watch[0]


def exhausted_at(row: dict[str, Any], metric: OverlapRatio, w_drop: float) -> int | None:
    """Where Python cuts a response."""
    counts = overlap_counts(
        row["student_topk_ids"][:, : metric.k], row["teacher_topk_ids"][:, : metric.k]
    )
    bad = (counts < metric.min_count) & row["mask"]
    at = np.flatnonzero(np.cumsum(bad) == bad_event_budget(w_drop))
    return int(at[0]) + 1 if len(at) else None


def truncation(cut: int | None) -> str:
    return "none" if cut is None else f"after {cut}"


def test_it_begins_with_the_runs_and_names_the_model_without_its_folder(
    page: Page, shown: Site
) -> None:
    pane = opened(page, shown, "")
    expect(page.locator("#served")).to_contain_text("320 ids")
    expect(pane.locator("table.listing")).to_contain_text("demo")
    assert str(shown.runs.parent) not in page.locator("body").inner_text()
    assert "/" not in page.locator("#served").inner_text()


def test_from_the_runs_to_a_rollout_by_clicks_and_back(page: Page, shown: Site) -> None:
    pane = opened(page, shown, "")
    pane.get_by_role("link", name="demo").click()
    pane.get_by_role("link", name="step 1", exact=True).click()
    table = pane.locator("table.listing")
    expect(table).to_contain_text("overlap")
    # The lowest overlap is first, until another heading is pressed.
    overlaps = [float(text) for text in table.locator("tbody td:nth-child(2)").all_inner_texts()]
    assert (len(overlaps), overlaps) == (3, sorted(overlaps))
    table.get_by_role("button", name="length").click()
    table.get_by_role("button", name="length").click()
    lengths = table.locator("tbody td:nth-child(3)").all_inner_texts()
    assert lengths == ["200", "120", "80"]
    # What looks like HTML is text.
    expect(table).to_contain_text("<img src=x onerror=alert(1)>")
    table.get_by_role("link", name="rollout 0").click()
    expect(pane.locator(".tokens")).to_be_visible()
    row = shown.row(1, 0, LENGTHS[1, 0])
    assert stat(pane, "Tokens") == "120"
    assert stat(pane, "Bad events") == str(row["num_bad_events"])
    assert stat(pane, "Truncation") == truncation(row["exhausted_at"])
    assert float(stat(pane, "Overlap")) == pytest.approx(row["mean_overlap"], abs=1e-3)
    assert stat(pane, "Teacher") == "teacher-large"
    page.go_back()
    expect(pane.locator("table.listing")).to_contain_text("Rollouts of step 1")


def test_sliders_move_the_truncation_as_python_says(page: Page, shown: Site) -> None:
    pane, row = opened(page, shown), shown.row(1, 0, LENGTHS[1, 0])
    metric = POLICY.metric
    assert isinstance(metric, OverlapRatio)
    seen = set()
    for name, keys, change in (
        ("threshold", ["ArrowRight"] * 15, {"threshold": 0.65}),
        ("k", ["ArrowLeft"] * 3, {"k": 5}),
        ("threshold", ["End"], {"threshold": 1.0}),
    ):
        slide(pane, name, *keys)
        metric = OverlapRatio(**{"k": metric.k, "threshold": metric.threshold, **change})
        cut = exhausted_at(row, metric, POLICY.w_drop)
        expect(pane.locator(".stats")).to_contain_text(f"Truncation{truncation(cut)}")
        seen.add(cut)
    slide(pane, "w_drop", "End")
    first = exhausted_at(row, metric, 1.0)
    expect(pane.locator(".stats")).to_contain_text(f"Truncation{truncation(first)}")
    assert len({*seen, first}) >= 3
    assert pane.locator(".upright.cut").count() == 1
    expect(pane.locator(".tok.last")).to_have_attribute("data-t", str((first or 0) - 1))
    pane.get_by_role("button", name="back to the run's own").click()
    expect(pane.locator(".stats")).to_contain_text(f"Truncation{truncation(row['exhausted_at'])}")
    slide(pane, "w_drop", "Home")
    expect(pane.locator(".stats")).to_contain_text("Truncationnone")
    assert pane.locator(".upright.cut").count() == 0


def test_a_resting_mouse_does_not_override_the_chosen_token(page: Page, shown: Site) -> None:
    pane = opened(page, shown)
    where, tokens = pane.locator(".inspector h3"), pane.locator(".tokens")
    expect(where).to_have_text("Token 1 of 120")
    pane.locator("[data-t='7']").hover()
    expect(where).to_have_text("Token 8 of 120 (under the mouse)")
    tokens.focus()
    page.keyboard.press("ArrowRight")
    expect(where).to_have_text("Token 2 of 120")
    # The mouse rests while text moves below it, which Chromium tells as a move to where it is.
    box = tokens.bounding_box()
    assert box is not None
    rests = (box["x"] + 30, box["y"] + 25)
    page.mouse.move(*rests)
    expect(where).to_contain_text("under the mouse")
    page.keyboard.press("End")
    page.mouse.move(*rests)
    page.mouse.move(*rests)
    expect(where).to_have_text("Token 120 of 120")
    page.mouse.move(rests[0] + 40, rests[1])
    expect(where).to_contain_text("under the mouse")
    pane.locator("[data-t='9']").click()
    expect(where).to_have_text("Token 10 of 120")
    expect(pane.locator("[data-t='9']")).to_have_attribute("aria-selected", "true")
    page.mouse.move(5, 5)
    expect(where).to_have_text("Token 10 of 120")
    # Lists of both, side by side, the sampled token marked.
    tables = pane.locator(".lists table")
    assert tables.locator("caption").all_inner_texts() == ["Teacher's top-K", "Student's top-K"]
    assert tables.first.locator("tbody tr").count() == 8


def test_the_keyboard_reaches_everything(page: Page, shown: Site) -> None:
    pane = opened(page, shown)
    where, tokens = pane.locator(".inspector h3"), pane.locator(".tokens")
    pane.locator("input[name='colour-a']").first.focus()
    for _ in range(6):
        page.keyboard.press("Tab")
        if tokens.evaluate("node => node === document.activeElement"):
            break
    assert tokens.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
    page.keyboard.press("ArrowDown")
    row = int(tokens.get_attribute("aria-activedescendant").rpartition("-")[2])  # type: ignore[union-attr]
    assert row > 3
    page.keyboard.press("PageDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("End")
    expect(where).to_have_text("Token 120 of 120")
    assert pane.locator("[data-t='119']").is_visible()
    page.keyboard.press("ArrowRight")
    expect(where).to_have_text("Token 120 of 120")


def test_the_chart_has_axes_and_chooses_tokens(page: Page, shown: Site) -> None:
    pane = opened(page, shown)
    chart = pane.locator("svg.chart")
    assert chart.locator(".axis").count() == 3
    expect(chart).to_contain_text("position (tokens)")
    box = chart.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    expect(pane.locator(".readout")).to_contain_text(
        re.compile(r"token (5|6)\d: overlap 0\.\d+, R")
    )
    expect(pane.locator(".inspector h3")).to_contain_text("under the mouse")
    page.mouse.down()
    page.mouse.up()
    expect(pane.locator(".inspector h3")).to_have_text(re.compile(r"^Token (5|6)\d of 120$"))
    assert chart.locator(".upright.chosen").count() == 1


def test_colours_say_the_measure_that_is_chosen(page: Page, shown: Site) -> None:
    pane, row = opened(page, shown), shown.row(1, 0, LENGTHS[1, 0])
    for name, values in (
        ("KL", np.minimum(row["reverse_kl"] / 2, 1)),
        ("weight", row["weight"] / row["weight"].max()),
        ("teacher log-prob", np.minimum(-row["teacher_logprobs"] / 6, 1)),
        ("overlap", 1 - row["overlap"]),
    ):
        pane.get_by_label(name, exact=True).check()
        level = int(values[0] * 10 + 1e-3)
        shade = pane.locator("[data-t='0']").get_attribute("class")
        # The file has three digits: a value at the edge of two steps may be in either.
        assert shade is not None
        assert re.search(rf"\bl({min(level, 9)}|{max(level - 1, 0)})\b", shade), (name, shade)


def test_a_link_reopens_the_view(page: Page, shown: Site) -> None:
    pane = opened(page, shown)
    slide(pane, "threshold", *["ArrowRight"] * 10)
    pane.get_by_label("KL", exact=True).check()
    pane.locator("[data-t='5']").click()
    page.wait_for_url(re.compile(r"a\.t=5"))
    page.wait_for_url(re.compile(r"a\.threshold=0\.6"))
    metric = OverlapRatio(k=POLICY.metric.k, threshold=0.6)
    cut = exhausted_at(shown.row(1, 0, LENGTHS[1, 0]), metric, POLICY.w_drop)
    expect(pane.locator(".stats")).to_contain_text(f"Truncation{truncation(cut)}")
    link = page.url
    page.goto("about:blank")
    page.goto(link)
    expect(pane.locator(".inspector h3")).to_have_text("Token 6 of 120")
    assert stat(pane, "Truncation") == truncation(cut)
    assert pane.get_by_label("KL", exact=True).is_checked()


def test_two_rollouts_and_two_steps_side_by_side(page: Page, shown: Site) -> None:
    pane = opened(page, shown)
    pane.get_by_role("button", name="Open beside").click()
    beside = page.locator(".pane").nth(1)
    beside.get_by_role("link", name="step 1").click()
    beside.get_by_role("link", name="rollout 1").click()
    expect(beside.locator(".inspector h3")).to_have_text("Token 1 of 80")
    expect(pane.locator(".inspector h3")).to_have_text("Token 1 of 120")
    beside.get_by_role("link", name="demo").click()
    beside.get_by_role("link", name="step 2", exact=True).click()
    pane.get_by_role("link", name="step 1").click()
    expect(pane.locator("caption")).to_contain_text("step 1")
    expect(beside.locator("caption")).to_contain_text("step 2")
    link = page.url
    page.goto("about:blank")
    page.goto(link)
    expect(page.locator(".pane").nth(1).locator("caption")).to_contain_text("step 2")
    page.locator(".pane").first.get_by_role("button", name="Close").click()
    expect(page.locator(".pane")).to_have_count(1)
    expect(page.locator("caption")).to_contain_text("step 2")


def test_what_is_saved_is_what_is_shown(page: Page, shown: Site, tmp_path: Path) -> None:
    pane, row = opened(page, shown), shown.row(1, 0, LENGTHS[1, 0])

    def saved(name: str) -> bytes:
        with page.expect_download() as waiting:
            pane.get_by_role("button", name=name).click()
        path = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(path)
        assert path.name == f"demo-step-1-rollout-0.{name.lower()}"
        return path.read_bytes()

    lines = list(csv.DictReader(io.StringIO(saved("CSV").decode(), newline="")))
    assert [int(line["token_id"]) for line in lines] == row["response_ids"].tolist()
    texts = "".join(line["text"] for line in lines if not line["text"].startswith("<|"))
    assert "<script>alert(1)</script>" in texts
    np.testing.assert_allclose([float(x["overlap"]) for x in lines], row["overlap"], atol=1e-6)
    np.testing.assert_allclose(
        [float(x["reliability"]) for x in lines], row["reliability"], atol=1e-6
    )
    table = pq.read_table(io.BytesIO(saved("Parquet")))
    assert table["response_ids"].to_pylist() == [row["response_ids"].tolist()]
    assert saved("PNG").startswith(b"\x89PNG")


def test_sixteen_thousand_tokens_are_few_nodes_and_little_layout(page: Page, shown: Site) -> None:
    pane = opened(page, shown, "#a.run=demo&a.step=3&a.index=0")
    assert stat(pane, "Tokens") == f"{LONG:,}"
    assert page.locator("*").count() < 2500
    moves = 20
    counters = Counters(page)
    slide(pane, "threshold", *["ArrowRight"] * moves)
    expect(pane.locator(".controls output").first).to_have_text("0.7")
    # A move is a frame's style and layout, and what a key press does of its own.
    assert 0 < counters.since("LayoutCount") <= 4 * moves
    assert page.locator("*").count() < 2500
    pane.locator(".tokens").focus()
    page.keyboard.press("End")
    expect(pane.locator(".inspector h3")).to_have_text(f"Token {LONG:,} of {LONG}".replace(",", ""))
    assert pane.locator(f"[data-t='{LONG - 1}']").is_visible()
    assert page.locator("*").count() < 2500


@pytest.mark.parametrize("width", [360, 2000])
def test_no_width_scrolls_sideways(page: Page, shown: Site, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for link in ("", "#a.run=demo", "#a.run=demo&a.step=1", ROLLOUT, f"{ROLLOUT}&b.run=demo"):
        opened(page, shown, link)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, link


def test_a_tap_chooses_a_token_on_a_small_screen(chromium: Browser, shown: Site) -> None:
    context = chromium.new_context(viewport={"width": 360, "height": 700}, has_touch=True)
    page = context.new_page()
    watched = Watch(page, shown.server.http_address)
    pane = opened(page, shown)
    pane.locator("[data-t='12']").tap()
    expect(pane.locator(".inspector h3")).to_have_text("Token 13 of 120")
    assert pane.locator(".lists table").count() == 2
    context.close()
    watched.check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Page, shown: Site, scheme: Any) -> None:
    from axe_playwright_python.base import AXE_SCRIPT

    page.emulate_media(color_scheme=scheme)
    for link in (
        "",
        "#a.run=demo",
        "#a.run=demo&a.step=1",
        f"{ROLLOUT}&a.metric=overlap_ratio&a.threshold=0.9&a.w_drop=0.1&b.paste=1",
    ):
        opened(page, shown, link)
        page.evaluate(AXE_SCRIPT)  # the policy lets no script in, the debugger may
        found = page.evaluate("axe.run().then((all) => all.violations)")
        grave = [
            (rule["id"], rule["impact"], [node["html"][:200] for node in rule["nodes"]][:3])
            for rule in found
            if rule["impact"] in ("serious", "critical")
        ]
        assert grave == [], link


def test_the_definitions_in_the_browser_are_those_of_python(page: Page, shown: Site) -> None:
    page.goto(shown.url)
    rng = np.random.default_rng(0)
    for _ in range(20):
        n, wide, width = (int(x) for x in rng.integers(1, 12, 3))
        n *= 20
        teacher = np.array([rng.permutation(20)[:wide] for _ in range(n)], np.int32)
        student = rng.integers(0, 20, (n, width)).astype(np.int32)
        ids = rng.integers(0, 20, n).astype(np.int32)
        logprobs = np.log(rng.dirichlet(np.ones(wide + 1), n))[:, :wide]
        logprobs = np.sort(logprobs, axis=1)[:, ::-1].astype(np.float32)
        threshold, top_p, w_drop = (round(float(x), 3) for x in rng.uniform(0.02, 1, 3))
        got = page.evaluate(
            """async (given) => {
              const {teacher, student, ids, logprobs, k, n, wide, width} = given;
              const {threshold, topP, wDrop} = given;
              const drift = await import("/page/drift.js");
              const from = drift.commonFrom(student, teacher, n, width, wide);
              const counts = drift.overlapCounts(from, n, width, k);
              const bad = Uint8Array.from(counts, (c) => c < drift.minCount(threshold, k) ? 1 : 0);
              const outside = drift.outsideNucleus(ids, teacher, logprobs, n, wide, k, topP);
              return {counts: [...counts], bad: [...bad], outside: [...outside],
                r: [...drift.reliability(wDrop, bad)], cut: drift.exhaustedAt(wDrop, bad),
                budget: drift.badEventBudget(wDrop)};
            }""",
            {
                **{"teacher": teacher.ravel().tolist(), "student": student.ravel().tolist()},
                **{"ids": ids.tolist(), "logprobs": logprobs.ravel().astype(float).tolist()},
                **{"k": min(wide, width), "n": n, "wide": wide, "width": width},
                **{"threshold": threshold, "topP": top_p, "wDrop": w_drop},
            },
        )
        k = min(wide, width)
        counts = overlap_counts(student[:, :k], teacher[:, :k])
        np.testing.assert_array_equal(got["counts"], counts)
        bad = counts < OverlapRatio(k=k, threshold=threshold).min_count
        np.testing.assert_array_equal(np.array(got["bad"], bool), bad)
        np.testing.assert_array_equal(got["r"], reliability(w_drop, bad))
        outside = slow_outside_nucleus(ids, teacher[:, :k], logprobs[:, :k], top_p)
        np.testing.assert_array_equal(np.array(got["outside"], bool), outside)
        assert TeacherTopPAccept(k=k, top_p=top_p).name == "teacher_top_p_accept"
        assert got["budget"] == bad_event_budget(w_drop)
        at = np.flatnonzero(np.cumsum(bad) == bad_event_budget(w_drop))
        assert got["cut"] == (int(at[0]) + 1 if len(at) else None)


def test_tokens_that_share_a_character_are_one_unit_each_to_be_chosen(
    page: Page, shown: Site
) -> None:
    pane = opened(page, shown)
    row = shown.row(1, 0, LENGTHS[1, 0])
    text = shown.tokenizer.decode(row["response_ids"].tolist(), skip_special_tokens=False)
    drawn = pane.locator(".unit .glyph").all_inner_texts()
    for character in ("水", "冷", "👩‍👩‍👧", "e\u0301"):
        assert character in text
        assert character in drawn, "not one unit"
    water = pane.locator(".unit").filter(has_text="水").first
    parts = water.locator("[role=option]")
    assert parts.count() == 3
    parts.nth(1).click()
    expect(parts.nth(1)).to_have_attribute("aria-selected", "true")
    expect(parts.nth(0)).to_have_attribute("aria-selected", "false")
    assert parts.nth(1).get_attribute("aria-label") == "水, part 2 of 3"


def test_what_cannot_be_shown_is_said_and_the_old_is_gone(
    watch: tuple[Page, Watch], shown: Site
) -> None:
    page, watched = watch
    watched.may_be_refused = True
    pane = opened(page, shown)
    page.evaluate("location.hash = '#a.run=demo&a.step=1&a.index=77'")
    failure = pane.locator(".failure")
    expect(failure).to_contain_text("has no rollout 77; there are 0, 1, 2")
    assert pane.locator(".tokens").count() == 0
    page.go_back()
    expect(pane.locator(".inspector h3")).to_have_text("Token 1 of 120")
    expect(failure).to_be_hidden()
    cut = shown.runs / "broken" / "rollouts" / "step-000001.parquet"
    cut.parent.mkdir(parents=True)
    whole = (shown.runs / "demo" / "rollouts" / "step-000001.parquet").read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    page.evaluate("location.hash = '#a.run=broken'")
    expect(pane.locator(".warnings")).to_contain_text(
        "broken/rollouts/step-000001.parquet: cut short"
    )
    (cut).unlink()


def test_a_pasted_response_is_shown_as_text_whatever_it_says(page: Page, shown: Site) -> None:
    response = "<script>document.title='run'</script><img src=x onerror=alert(1)> 水 e\u0301"
    pane = pasted(page, shown, "What is <b>this</b>?", response)
    expect(pane.locator(".tokens")).to_contain_text("水")
    assert stat(pane, "Tokens") == str(len(shown.tokenizer.encode(response).ids))
    assert "run" not in page.title()
    assert pane.locator("script, img, b").count() == 0
    pane.locator("summary", has_text=re.compile("^Prompt$")).click()
    expect(pane.locator(".prompt")).to_have_text("What is <b>this</b>?")
    # Without the student's list there is no overlap, and the policy is one that needs none.
    assert pane.get_by_label("overlap", exact=True).is_disabled()
    assert pane.locator("select").input_value() == "teacher_top_p_accept"
    before = int(stat(pane, "Bad events"))
    slide(pane, "top_p", "Home")
    expect(pane.locator(".controls output").nth(1)).to_have_text("0.01")
    assert int(stat(pane, "Bad events")) >= before
    page.wait_for_url(re.compile(r"a\.top_p=0\.01"))
    link = page.url
    page.goto("about:blank")
    page.goto(link)
    expect(pane.locator(".tokens")).to_contain_text("水")


def test_candidates_give_a_pasted_response_its_overlap(page: Page, shown: Site) -> None:
    pane = opened(page, shown, "#a.paste=1")
    pane.get_by_label("Prompt", exact=True).fill("1 2 3")
    pane.get_by_label("Response", exact=True).fill("4 5")
    pane.get_by_label("token ids", exact=True).check()
    pane.locator("summary", has_text="candidates").click()
    pane.locator("textarea").nth(2).fill("[[1, 2, 3], [4, 5, 6]]")
    pane.get_by_role("button", name="Analyse").click()
    expect(pane.locator(".lists caption").nth(1)).to_have_text("Candidates")
    assert pane.get_by_label("overlap", exact=True).is_checked()


def test_an_error_takes_the_place_of_the_old_report_and_a_new_one_begins_at_its_top(
    watch: tuple[Page, Watch], shown: Site
) -> None:
    page, watched = watch
    watched.may_be_refused = True
    long = " ".join(str(1 + i % 300) for i in range(2000))
    pane = pasted(page, shown, "1 2", long, ids=True)
    tokens = pane.locator(".tokens")
    tokens.focus()
    page.keyboard.press("End")
    assert tokens.evaluate("node => node.scrollTop") > 0
    pane.get_by_label("Response", exact=True).fill("1 2 99999")
    pane.get_by_role("button", name="Analyse").click()
    expect(pane.locator(".failure")).to_contain_text("99999")
    assert (tokens.count(), pane.get_by_label("Prompt", exact=True).input_value()) == (0, "1 2")
    expect(pane.locator(".body")).not_to_contain_text("loading")
    pane.get_by_label("Response", exact=True).fill("1 x")
    pane.get_by_role("button", name="Analyse").click()
    expect(pane.locator(".failure")).to_contain_text('"x" in the response is not a token id')
    pane.get_by_label("Response", exact=True).fill(long)
    pane.get_by_role("button", name="Analyse").click()
    expect(tokens).to_be_visible()
    expect(pane.locator(".failure")).to_be_hidden()
    assert tokens.evaluate("node => node.scrollTop") == 0
    expect(pane.locator(".inspector h3")).to_have_text("Token 1 of 2000")


def test_a_k_that_a_reply_cannot_hold_is_lowered_and_said(page: Page, shown: Site) -> None:
    pane = opened(page, shown, "#a.paste=1")
    pane.get_by_label("Top-K").fill("120")
    pane.get_by_label("Prompt", exact=True).fill("1")
    pane.get_by_label("Response", exact=True).fill(" ".join(["7"] * LONG))
    pane.get_by_label("token ids", exact=True).check()
    pane.get_by_role("button", name="Analyse").click()
    expect(pane.locator(".tokens")).to_be_visible()
    expect(pane.locator("form .hint")).to_contain_text(f"Top-K is {1_048_576 // LONG} here")
    assert stat(pane, "Tokens") == f"{LONG:,}"


def test_the_token_is_asked_for_and_is_in_no_link(watch: tuple[Page, Watch], shown: Site) -> None:
    page, watched = watch
    watched.may_be_refused = True
    refusal = {"type": "UnauthenticatedError", "message": "no bearer token"}

    def guarded(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer good":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": refusal})

    page.route("**/v1/**", guarded)
    pane = opened(page, shown)
    expect(pane.locator(".failure")).to_contain_text("no bearer token")
    page.get_by_label("Access token").fill("good")
    page.get_by_label("Access token").press("Enter")
    expect(pane.locator(".inspector h3")).to_have_text("Token 1 of 120")
    expect(page.get_by_label("Access token")).to_be_hidden()
    pane.locator("[data-t='3']").click()
    page.wait_for_url(re.compile(r"a\.t=3"))
    assert "good" not in page.url
    assert page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])") == "[{},{}]"
