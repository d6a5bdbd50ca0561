"""Pages of runs and rollouts: everything in one file, nothing run, nothing left out in silence.

Run: python -m pytest tests/reports
"""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rollout_records.writing import table_of
from run_report.drawing import Chart
from run_report.excerpts import MAX_TOKENS, excerpts
from run_report.figures import Bands, Profile, RunFigures, Warned
from run_report.page import report
from run_report.rollout_charts import by_position, rollout_charts, token_shares
from run_report.run_charts import run_charts
from run_report.savings import seconds_saved, spent, spent_by_step, total
from run_report.token_pieces import pieces
from tests.records.made_rows import made_row

SCRIPT = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>"


def profile(*rows: tuple[int, int, str], overlap: tuple[float, ...] = (0.9, 0.8)) -> Profile:
    """Of rollouts: tokens kept, generated, and how each ended."""
    kept, generated, finish = zip(*rows, strict=True)
    bands = Bands(width=16, overlap=overlap, rollouts=[len(rows)] * len(overlap), of=len(rows))
    return Profile(lengths=kept, generated=generated, finish=finish, bands=bands)


def run_of(name: str = "one", **changes: Any) -> RunFigures:
    """Three steps with everything a page shows."""
    made = RunFigures(
        name=name,
        about=[("student", "a/student")],
        settings={"loss.kind": name, "run.seed": "0"},
        groups=lambda figure: "update" if figure == "loss" else "",
        steps={
            step: {
                "loss": 1.0 / step,
                "grad_norm": 1.0,
                "overlap": 0.88 + 0.04 * step,
                "weight_mean": 1.0,
                "weight_min": 0.5,
                "weight_max": 1.5,
                "generated_tokens": 100.0,
                "length_mean": 30.0,
                "max_tokens": 64.0,
                "seconds_generate": 2.0,
                "seconds_learn": 1.0,
            }
            for step in (1, 2, 3)
        },
        evaluations={0: {"accuracy": 0.1}, 3: {"accuracy": 0.7, "heldout_reverse_kl": 0.5}},
        profiles={
            step: profile((10, 12, "truncated"), (20, 20, "stop"), (64, 64, "length"))
            for step in (1, 2, 3)
        },
        heldout={0: Bands(width=16, overlap=[0.5], rollouts=[4], of=4)},
        budgets={1: 64, 2: 64, 3: 64},
        references={"accuracy": 0.95},
        warnings=[
            Warned(kind="support_mass", first_step=2, last_step=3, steps=2, message="Do it.")
        ],
        rollouts=table_of([made_row(i, step=3, prompt=SCRIPT, response=SCRIPT) for i in range(7)]),
        notes=[],
    )
    return replace(made, **changes)


class Tags(HTMLParser):
    """Every tag of a page, and what it refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.references.append(value or "")


@pytest.fixture(scope="module")
def page() -> str:
    return report([run_of()], "one").html()


def test_a_page_is_whole_in_itself_and_runs_nothing(page: str) -> None:
    tags = Tags(page)
    assert "script" not in tags.tags
    assert "img" not in tags.tags
    assert all(ref.startswith(("#", "data:image/png;base64,")) for ref in tags.references)
    assert SCRIPT not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "http" not in re.sub(r'(?:xmlns(?::\w+)?|http-equiv)="[^"]*"|http-equiv', "", page)
    for style in re.findall(r"<style.*?</style>", page, re.DOTALL):
        assert "url(" not in style.replace("url(#", "")
        assert "@import" not in style


def test_the_pictures_have_the_colours_of_the_page_and_ids_of_their_own(page: str) -> None:
    tags = Tags(page)
    assert len(tags.ids) == len(set(tags.ids))
    referred = {ref.removeprefix("#") for ref in tags.references if ref.startswith("#")}
    referred |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert referred <= set(tags.ids)
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(svgs) > 20
    assert not any(re.search(r"#(?:10151c|1c5fa8|59636f)", svg) for svg in svgs)
    assert "prefers-color-scheme: dark" in page


def test_every_figure_is_in_a_picture(page: str) -> None:
    run = run_of()
    for _, name in run.names():
        assert f"<code>{name}</code>" in page
    assert page.count('class="spark"') == len(list(run.names()))
    assert "0.3333" in page, "the last of a figure"
    assert "0.92" in page, "the first of another"


def test_what_a_person_looks_for_is_there(page: str) -> None:
    for text in (
        *("10.0% → 70.0%", "Do it.", "support mass", "2, 2 to 3", "a/student", "loss.kind"),
        *("Right answers to held-out problems", "Overlap by position, over the steps"),
        *("Lengths and truncation points", "Where the time went", "Tokens spent and saved"),
        *("the teacher", "Weights", "Gradient norm", "How rollouts ended"),
        *("Reverse KL by position", "Best", "Worst", "7 rollouts of step 3"),
        *("R reached 0 in", "0 of 7"),
    ):
        assert text in page, text
    assert "in part" not in page


def test_several_runs_are_drawn_over_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [run_of("one"), run_of("another", rollouts=None, notes=["It goes on."])]
    made = report(runs, "two")
    loss = next(chart for chart in made.charts if chart.name == "loss").svg()
    monkeypatch.setattr(Chart, "svg", lambda chart: f"<svg>{chart.name}</svg>")
    html = made.html()
    Tags(html)
    names = [chart.name for chart in made.all_charts]
    assert len(names) == len(set(names))
    assert {"overlap-by-position-1", "overlap-by-position-2", "lengths", "seconds"} <= {*names}
    assert "<strong>another: in part.</strong> It goes on." in html
    assert made.settings == [("loss.kind", ["one", "another"])], "only what differs"
    assert ">one<" in loss
    assert ">another<" in loss


def test_a_run_with_next_to_nothing_has_a_page() -> None:
    html = report([RunFigures(name="empty", steps={1: {"loss": 0.0}})], "empty").html()
    assert "<code>loss</code>" in html
    assert report([RunFigures(name="nothing")], "nothing").html()


def test_pictures_become_files_and_a_page_is_replaced_whole(tmp_path: Path) -> None:
    made = report([RunFigures(name="one", steps={1: {"loss": 1.0}, 2: {"loss": 0.5}})], "one")
    paths = made.save_charts(tmp_path / "pngs")
    assert [path.name for path in paths] == ["loss.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    target = tmp_path / "deep" / "report.html"
    assert made.write(target).read_text().startswith("<!doctype html>")
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def drawn(run: RunFigures, name: str) -> Any:
    """The axis of a picture."""
    axis = Figure().subplots()
    next(chart for chart in run_charts([run]) if chart.name == name).draw(axis)
    return axis


def test_the_axis_of_overlaps_goes_as_far_as_the_values() -> None:
    run = run_of(profiles={1: profile((40, 40, "stop"), overlap=(1.0, 0.95, 0.88))})
    low, high = drawn(run, "overlap-first-last").get_ylim()
    assert 0.85 < low < 0.88
    assert 1.0 < high < 1.03
    low, high = drawn(run, "overlap").get_ylim()
    assert 0.9 < low <= 0.92
    assert 1.0 <= high < 1.02


def test_a_heat_map_leaves_out_what_few_rollouts_reach() -> None:
    bands = Bands(width=16, overlap=[0.9, 0.8, 0.1], rollouts=[20, 20, 1], of=20)
    first = Profile(lengths=[30] * 20, generated=[30] * 20, finish=["stop"] * 20, bands=bands)
    axis = drawn(
        run_of(profiles={1: first, 2: profile((9, 9, "stop"), overlap=(0.7,))}),
        "overlap-by-position",
    )
    (image,) = axis.get_images()
    assert np.ma.filled(image.get_array(), -1.0).tolist() == [[0.9, 0.7], [0.8, -1.0]]
    assert image.get_extent() == [0.5, 2.5, 0, 32]


def test_savings_of_a_worked_example() -> None:
    step = profile(
        (10, 12, "truncated"), (20, 30, "truncated"), (20, 20, "stop"), (30, 30, "length")
    )
    of_step = spent(step, 64)
    assert (of_step.generated, of_step.kept, of_step.stopped, of_step.past_stop) == (92, 80, 2, 12)
    # Up to 64: 52 + 34; as long as the mean of the others, 25: 13 + 0.
    assert (of_step.saved_at_most, of_step.saved_likely) == (86, 13)
    assert spent(step, None).saved_at_most is None
    all_stopped = spent(profile((5, 8, "truncated")), 10)
    assert (all_stopped.saved_at_most, all_stopped.saved_likely) == (2, None)
    both = total({1: of_step, 2: all_stopped})
    assert (both.saved_at_most, both.saved_likely, both.generated) == (88, None, 100)
    run = run_of()
    assert total(spent_by_step(run)).saved_at_most == 3 * 52
    assert seconds_saved(run, 150) == pytest.approx(3.0)
    assert seconds_saved(run, None) is None


def test_tokens_of_one_character_are_one_piece() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids = tokenizer.encode("a漢é").ids
    assert len(ids) == 6
    assert pieces(tokenizer, ids) == [(1, "a"), (3, "漢"), (2, "é")]
    assert pieces(tokenizer, ids[:3]) == [(1, "a"), (2, "\ufffd")]
    assert sum(n for n, _ in pieces(tokenizer, [9999, *ids])) == 7


def test_excerpts_rank_shade_and_cut() -> None:
    long = MAX_TOKENS + 40
    rows = [
        made_row(0, tokens=long, overlap=np.full(long, 0.5)),
        made_row(1, overlap=np.ones(12), finish="truncated", exhausted_at=7, correct=False),
        made_row(2, overlap=np.zeros(12)),
    ]
    rows[1]["reverse_kl"] = np.array([0.0] * 3 + [3.0] * 9)
    found = excerpts(table_of(rows), lambda ids: [(1, "x")] * len(ids), count=2)
    assert (found.ranked_by, found.shaded_by) == ("overlap", "reverse KL")
    assert [e.title for e in found.best] == [
        "step 1, rollout 1: problem-1",
        "step 1, rollout 0: problem-0",
    ]
    assert [e.title for e in found.worst] == ["step 1, rollout 2: problem-2"]
    first, second = found.best
    assert [(p.text, p.shade) for p in first.pieces] == [("xxx", 0), ("x" * 9, 4)]
    assert ("R reached 0 after", "7 tokens") in first.facts
    assert ("answer", "wrong") in first.facts
    assert ("expected", "2") in first.facts
    assert second.tokens_left_out == 40
    assert sum(len(p.text) for p in second.pieces) == MAX_TOKENS
    (plain,) = excerpts(table_of(rows[2:]), None, count=2).best
    assert [(p.text, p.shade) for p in plain.pieces] == [("2" * 12, 0)]


def test_positions_and_tokens_of_a_worked_example() -> None:
    row = made_row(0, tokens=4, response_ids=np.array([7, 7, 8, 9], np.int32))
    row |= {"reverse_kl": np.array([1.0, 2.0, 5.0, 1.0]), "mask": np.array([1, 1, 0, 1], np.bool_)}
    table = table_of([row, made_row(1, tokens=4, with_candidates=False)])
    profile_ = by_position(table, "reverse_kl")
    assert profile_ is not None
    assert profile_.mean.tolist() == [2.25]
    assert profile_.middles.tolist() == [2.0]
    measure, shares = token_shares(table, None)
    assert measure == "reverse KL"
    assert [(s.token_id, s.count, s.share, s.mean) for s in shares] == [
        (7, 2, 0.75, 1.5),
        (9, 1, 0.25, 1.0),
    ]
    assert by_position(table, "entropies") is None


def test_ends_that_others_name_are_drawn_as_not_said() -> None:
    rows = [made_row(i, finish=finish) for i, finish in enumerate(("eos", "eos", "stop"))]
    for part, labels in ((rows[:2], []), (rows, ["ended by the student", "not said"])):
        axis: Any = Figure().subplots()
        rollout_charts(table_of(part))[-1].draw(axis)
        shown = axis.get_legend()
        assert [t.get_text() for t in shown.get_texts()] == labels if shown else not labels
        assert sum(bar.get_height() for bar in axis.patches) == len(part)
    axis = drawn(run_of(profiles={1: profile((9, 9, "eos"), (9, 9, "eos"))}), "ends")
    assert [bar.get_height() for bar in axis.patches] == [1.0]


def test_names_of_runs_are_drawn_as_they_stand() -> None:
    made = report([run_of(r"x$\frac$"), run_of("_a")], "two")
    for chart in made.charts:
        if chart.name in ("loss", "weights", "seconds"):
            svg = chart.svg()
            assert r">x$\frac$<" in svg, chart.name
            assert re.search(r">\s?_a<", svg), chart.name
    assert {"loss", "weights", "seconds"} <= {chart.name for chart in made.charts}


def test_rollouts_without_the_student_s_view_have_a_page() -> None:
    rows = [made_row(i, with_candidates=False, finish="unknown", step=0) for i in range(3)]
    html = report([RunFigures(name="f.jsonl", rollouts=table_of(rows))], "f.jsonl").html()
    assert "-log p_teacher" in html
    assert "how unlikely the teacher finds a token" in html
    assert "Reverse KL by position" not in html
    assert "Warnings" not in html, "there were no steps to warn of"
    empty: pa.Table = table_of([])
    assert report([RunFigures(name="none", rollouts=empty)], "none").html()
