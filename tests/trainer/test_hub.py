"""A trained student goes to a hub, with a card that says what it is.

The hub is ours and on loopback; the client is huggingface_hub, in a process of its own, because it
reads its environment once. Run: python -m pytest tests/trainer/test_hub.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from student_trainer.recording.model_card import model_card
from tests.trainer.small_hub import LARGE_BYTES, TOKEN, SmallHub, small_hub
from tests.trainer.test_train import InMemoryClient, configured, connect_to, prepared, run_through
from tests.waiting import LIMIT_S

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = prepared(tmp_path_factory.mktemp("hub"))
    with pytest.MonkeyPatch.context() as patch:
        connect_to(InMemoryClient(), patch)
        config = configured(folder, "run.steps=2")
        run_through(config)
    return config.run.out


def pushed(
    hub: SmallHub | None, *arguments: str, token: str = TOKEN
) -> subprocess.CompletedProcess[str]:
    environment = {
        "HF_ENDPOINT": hub.address if hub else "http://127.0.0.1:9",
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
    }
    return subprocess.run(
        [sys.executable, "-m", "student_trainer.cli", "push", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_a_pushed_student_is_the_saved_one_with_its_card(run: Path) -> None:
    with small_hub() as hub:
        done = pushed(hub, str(run), "--repo", "org/tiny", "--private")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{hub.address}/org/tiny"
        saved = {p.name: p.read_bytes() for p in (run / "student").iterdir()}
        assert hub.repositories == {"org/tiny": saved}
        assert {"README.md", "model.safetensors", "tokenizer.json", "config.json"} <= saved.keys()
        assert max(map(len, saved.values())) > LARGE_BYTES > min(map(len, saved.values()))
        assert hub.private == {"org/tiny"}
        assert hub.commits == ["Student of the run run"]
        assert hub.unknown == []


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("forbidden/tiny", TOKEN, "You don't have the rights"),
        ("org/tiny", "hf_wrong", "Invalid username or password."),
        ("a/b/c", TOKEN, "--repo a/b/c: must be ORG/NAME"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_the_remedy(
    run: Path, repo: str, token: str, said: str
) -> None:
    with small_hub() as hub:
        done = pushed(hub, str(run), "--repo", repo, token=token)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("HubError: ")
    assert said in line
    assert "HF_TOKEN" in line or "ORG/NAME" in line


def test_a_run_without_a_student_is_named(tmp_path: Path) -> None:
    done = pushed(None, str(tmp_path), "--repo", "org/tiny")
    assert done.returncode == 1
    assert f"HubError: {tmp_path}/student: no trained student" in done.stderr


def test_the_card_says_what_the_student_was_made_from_and_what_came_of_it(run: Path) -> None:
    card = (run / "student" / "README.md").read_text()
    assert card == model_card(run)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["on-policy-distillation", "driftline"],
    }
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = [step for step in steps if step["kind"] == "step"]
    summary = json.loads((run / "summary.json").read_text())
    assert (
        f"| reverse KL a token, nats | {first['reverse_kl']:.4g} | {last['reverse_kl']:.4g} |"
        in body
    )
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    assert f"| accuracy | {before:.4g} | {after:.4g} |" in body
    assert f"{summary['generated_tokens']:,} tokens were generated" in body
    for said in (
        "teacher: `in-memory`, float32, in-memory",
        f"prompts: `{run.parent}/train.jsonl`",
        "In each of 2 steps".lower(),
        "optim.learning_rate = 0.003",
        'loss.kind = "local_support_matching"',
        "from step 0: finished",
    ):
        assert said in body
    # Nothing of where things are and how the teacher is reached.
    assert "127.0.0.1" not in body
    assert "run.out" not in body


def test_a_student_of_the_hub_is_named_as_the_base(run: Path, tmp_path: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["starts"][-1]["settings"]["student.model"] = "Qwen/Qwen3-0.6B"
    for name in ("metrics.jsonl", "summary.json"):
        (tmp_path / name).write_text((run / name).read_text())
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert "\nbase_model: Qwen/Qwen3-0.6B\n" in model_card(tmp_path)
