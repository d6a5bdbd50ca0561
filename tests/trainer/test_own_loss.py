"""A loss of the user's own: found, tried, trained with, and refused before anything starts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from student_trainer.assembly import teachers
from student_trainer.assembly.own_loss import declared_loss, imported_loss, with_declared_needs
from student_trainer.cli import main
from student_trainer.errors import ConfigError, LossError
from student_trainer.losses import Needs
from student_trainer.settings.config import load_config
from tests.trainer.settings.smallest_config import SMALLEST
from tests.trainer.test_train import (
    InMemoryClient,
    client,
    configured,
    folder,
    records,
    run_through,
)

__all__ = ["client", "folder"]

GUIDE = Path(__file__).parents[2] / "docs" / "own-loss.md"
HEAD = """
import torch
from student_trainer.losses import (Needs, loss)

def gap(inputs):
    return 0.5 * (inputs.student_logprobs_BT - inputs.teacher_logprobs_BT).square()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, where modules of the user's lie."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        module = sys.modules[name]
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def written(here: Path, source: str, name: str = "mine") -> Path:
    path = here / f"{name}.py"
    path.write_text(HEAD + source, encoding="utf-8")
    return path


def documented(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    return str(block)


def test_the_documented_loss_trains_for_two_steps(
    here: Path, folder: Path, client: InMemoryClient
) -> None:
    (here / "my_losses.py").write_text(documented("python"), encoding="utf-8")
    path = folder / "trainer.toml"
    built_in = '[loss]\nkind = "local_support_matching"\n'
    path.write_text(path.read_text().replace(built_in, documented("toml")))
    config = configured(folder, "run.steps=2")
    run_through(config)
    losses = [step["loss"] for step in records(config, "step")]
    # Squared Hellinger, scaled by two, is at most 2.
    assert len(losses) == 2
    assert all(0.0 < value < 2.0 for value in losses)
    assert client.closed


def test_options_reach_the_loss(here: Path, folder: Path, client: InMemoryClient) -> None:
    (here / "my_losses.py").write_text(documented("python"), encoding="utf-8")
    found = {}
    for scale in (1.0, 2.0):
        config = configured(
            folder,
            f'loss={{"kind":"import","path":"my_losses:hellinger","options":{{"scale":{scale}}}}}',
            f"run.out={folder}/{scale}",
            "run.steps=1",
            "optim.updates_per_epoch=1",
        )
        run_through(config)
        found[scale] = records(config, "step")[0]["loss"]
    assert found[2.0] == pytest.approx(2 * found[1.0], rel=1e-6)


def test_a_package_in_the_current_directory_is_found(here: Path) -> None:
    (here / "pack").mkdir()
    written(
        here / "pack",
        '@loss(kind="surrogate", needs=Needs(student_topk=True))'
        "\ndef f(inputs): return gap(inputs)\n",
        "inner",
    )
    found = declared_loss("pack.inner:f")
    assert found.kind == "surrogate"
    assert found.needs == Needs(student_topk=True)


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("absent:f", "", "there is no module absent; looked in .* and where Python looks"),
        ("mine.inner:f", "", "there is no module mine.inner; looked in"),
        (
            "mine:f",
            "import not_there",
            r"raised ModuleNotFoundError: .*not_there.*mine",
        ),
        (
            "mine:f",
            "1 / 0",
            r"raised ZeroDivisionError: division by zero \(.*mine.py:8",
        ),
        ("mine:f", "raise SystemExit(3)", "importing it raised SystemExit: 3"),
        ("mine:f", "def broken(:", r"importing it raised SyntaxError"),
        ("mine:f", "f = 3", "mine:f is a int, not a function"),
        ("mine:f", "def f(inputs): return gap(inputs)", "does not say what it is: put @loss"),
        (
            "mine:g",
            '@loss(kind="divergence")\ndef f(i): return gap(i)',
            "no g; losses there: f",
        ),
        ("mine:f", '@loss(kind="other")\ndef f(i): return gap(i)', "kind must be divergence or"),
        ("mine", "", "must look like package.module:function"),
        ("mine:f.g", "", "must look like package.module:function"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_its_reason(
    here: Path, path: str, source: str, reason: str
) -> None:
    written(here, "\n" + source + "\n")
    with pytest.raises(LossError, match=reason):
        declared_loss(path)


@pytest.mark.parametrize(
    ("signature", "options", "reason"),
    [
        ("inputs, *, a=1", {"b": 2}, r"the options b: got an unexpected keyword argument 'b'; it"),
        ("inputs, *, a", {}, r"the options none: missing a required .*argument: 'a'; it takes"),
        ("", {}, r"too many positional arguments; it takes \(\)"),
        ("inputs, *, a", {"a": 1, "inputs": 2}, "multiple values for argument 'inputs'"),
    ],
)
def test_options_that_the_signature_does_not_take_are_refused(
    here: Path, signature: str, options: dict[str, object], reason: str
) -> None:
    written(here, f'\n@loss(kind="surrogate")\ndef f({signature}): return 1\n')
    with pytest.raises(LossError, match=reason):
        imported_loss("mine:f", options)


def test_a_broken_law_is_refused_before_anything_starts(
    here: Path, folder: Path, client: InMemoryClient, capsys: pytest.CaptureFixture[str]
) -> None:
    written(here, '\n@loss(kind="divergence")\ndef f(inputs): return -gap(inputs)\n')
    path = folder / "trainer.toml"
    own = 'loss={"kind":"import","path":"mine:f"}'
    assert main(["train", "--config", str(path), "--set", own]) == 2
    error = capsys.readouterr().err
    assert (
        "LossError: mine:f breaks a law of a divergence: a divergence is not negative: -" in error
    )
    assert client.sessions == []
    assert not (folder / "run").exists()
    assert main(["check-loss", "mine:f"]) == 2
    assert "a divergence is not negative" in capsys.readouterr().err


def test_check_loss_says_what_a_loss_needs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "my_losses.py").write_text(documented("python"), encoding="utf-8")
    assert main(["check-loss", "my_losses:hellinger", "--options", '{"scale": 2.0}']) == 0
    expected = "my_losses:hellinger: a divergence that obeys the laws; needs teacher_k 2\n"
    assert capsys.readouterr().out == expected
    assert main(["check-loss", "my_losses:hellinger", "--options", '{"size": 2.0}']) == 2
    assert "unexpected keyword argument 'size'" in capsys.readouterr().err
    assert main(["check-loss", "my_losses:hellinger", "--options", "[]"]) == 2
    assert "--options must be a JSON object" in capsys.readouterr().err


NEEDS = """
@loss(kind="surrogate", needs=Needs({}))
def f(inputs): return gap(inputs)
"""
OWN = 'loss={"kind":"import","path":"mine:f"}'


@pytest.mark.parametrize(
    ("needs", "overrides", "reason"),
    [
        ("student_topk=True", ["rollout.student_topk=0"], "loss mine:f .*rollout.student_topk > 0"),
        ("student_topk=True", ["rollout.top_p=0.9"], "loss mine:f .*full distribution"),
        ("teacher_k=65", [], "loss mine:f needs a teacher.k of at least 65, it is 64"),
    ],
)
def test_needs_that_the_run_does_not_have_are_refused(
    here: Path, needs: str, overrides: list[str], reason: str
) -> None:
    written(here, NEEDS.format(needs))
    (here / "trainer.toml").write_text(SMALLEST)
    metric = "drift.metric=teacher_top_p_accept"
    config = load_config(here / "trainer.toml", [OWN, metric, *overrides])
    with pytest.raises(ConfigError, match=reason):
        with_declared_needs(config)


def test_a_column_that_no_teacher_has_is_refused(here: Path) -> None:
    written(here, NEEDS.format("teacher_columns=('entropy',)"))
    (here / "trainer.toml").write_text(SMALLEST)
    with pytest.raises(LossError, match=r"mine:f: its needs: columns entropy: .* entropies"):
        with_declared_needs(load_config(here / "trainer.toml", [OWN]))


def test_what_a_loss_declares_is_asked_for(here: Path) -> None:
    written(here, NEEDS.format("teacher_columns=('entropies',), behavior_at_teacher_topk=True"))
    (here / "trainer.toml").write_text(SMALLEST)
    config = with_declared_needs(load_config(here / "trainer.toml", [OWN]))
    assert teachers.score_options(config).want_entropy
    assert config.needs_learner_behavior
    other = load_config(here / "trainer.toml")
    assert with_declared_needs(other) is other


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ('loss={"kind":"import"}', r"loss\.path: Field required"),
        ('loss={"kind":"import","path":"mine.f"}', r"loss\.path: .*pattern"),
        (
            'loss={"kind":"import","path":"mine:f","beta":1}',
            r"loss\.beta is read by kind generalized_jsd only; kind is import",
        ),
    ],
)
def test_settings_of_an_own_loss_are_checked(tmp_path: Path, override: str, reason: str) -> None:
    path = tmp_path / "trainer.toml"
    path.write_text(SMALLEST)
    with pytest.raises(ConfigError, match=reason):
        load_config(path, [override])
