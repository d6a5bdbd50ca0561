"""`student-trainer eval` of a checkpoint, with a real teacher over a loopback socket and without.

Run: python -m pytest tests/trainer/evaluation/test_checkpoint_eval.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from student_trainer import cli
from student_trainer.assembly import evaluating
from student_trainer.assembly.checkpoint_eval import evaluate_checkpoint
from student_trainer.errors import DatasetError
from student_trainer.rollouts.stream import LoopThread
from student_trainer.settings.config import load_config
from teacher_server.engine.hf_engine import HfEngine
from teacher_server.testing import local_teacher, teacher_info
from teacher_wire.errors import FingerprintMismatchError, NotReadyError
from teacher_wire.fingerprint import tokenizer_fingerprint
from tests.trainer.learner.tiny_student import character_tokenizer, tiny_student, write_tiny_student

SETTINGS = """
[run]
out = "{out}/run"
steps = 1
[student]
model = "{out}/student"
device = "cpu"
[sampler]
kind = "hf"
[data]
train = "{out}/no-such-file.jsonl"
heldout = "{out}/heldout.jsonl"
[rollout]
prompts_per_step = 1
student_topk = 20
temperature = 0.7
chunk_tokens = 8
max_context = 60
[teacher]
endpoints = ["{address}"]
connect_timeout_s = {patience_s}
k = 16
[drift]
k = 8
threshold = 0.7
w_drop = 0.01
[budget]
kind = "fixed"
max_tokens = 4
[loss]
kind = "local_support_matching"
[optim]
learning_rate = 1e-3
[eval]
num_prompts = 12
pass_k = [1, 2]
max_tokens = 24
answer_pattern = '(\\w)'
teacher_samples = 2
"""
NOWHERE = "127.0.0.1:1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher and problems."""
    made = tmp_path_factory.mktemp("eval")
    write_tiny_student(made / "student")
    write_tiny_student(made / "teacher", seed=1)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(i % 10), "id": f"p{i}"} for i in range(12)]
    (made / "answered.jsonl").write_text("\n".join(map(json.dumps, rows)))
    unanswered = ({"prompt": row["prompt"]} for row in rows)
    (made / "unanswered.jsonl").write_text("\n".join(map(json.dumps, unanswered)))
    return made


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """A teacher with a real model that serves over gRPC."""
    engine = HfEngine(model=str(folder / "teacher"), max_context=64, max_k=64, device="cpu")
    fingerprint = tokenizer_fingerprint(character_tokenizer())
    info = replace(teacher_info(engine), tokenizer_fingerprint=fingerprint, model_id="teacher")
    loop = LoopThread()
    served: AbstractAsyncContextManager[Any] = local_teacher(engine, info=info)

    async def start() -> str:
        await engine.start()
        return str((await served.__aenter__()).address)

    async def stop() -> None:
        await served.__aexit__(None, None, None)
        await engine.close()

    try:
        yield loop.run(start())
        loop.run(stop())
    finally:
        loop.close()


def configuration(folder: Path, data: str, address: str, patience_s: float = 60.0) -> Path:
    path = folder / "trainer.toml"
    text = SETTINGS.format(out=folder, address=address, patience_s=patience_s)
    path.write_text(text.replace("heldout.jsonl", f"{data}.jsonl"))
    return path


def exact_divergences(folder: Path, texts: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Reverse KL, forward KL and teacher's log-prob a token, over the whole vocabulary."""
    tokenizer = character_tokenizer()
    student, teacher = tiny_student(seed=0).eval(), tiny_student(seed=1).eval()
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for text in texts:
        prompt = tokenizer(text["prompt"])["input_ids"]
        response = json.loads(text["response"])
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            q, p = (
                torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].double() / 0.7, -1)
                for model in (student, teacher)
            )
        sums[0] += (q.exp() * (q - p)).sum()
        sums[1] += (p.exp() * (p - q)).sum()
        sums[2] += p.gather(1, torch.tensor(response)[:, None]).sum()
        count += len(response)
    return tuple((sums / count).tolist())


def test_figures_are_those_of_the_two_models(
    folder: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against both distributions in full, on the very responses: only what was sampled outside of
    the top-k, and the rest that counts as one token, may differ."""
    monkeypatch.setattr(evaluating, "decoder", lambda _: lambda ids: json.dumps(ids.tolist()))
    config = load_config(configuration(folder, "unanswered", address))
    result = evaluate_checkpoint(config, str(folder / "student"))
    assert (result["accuracy"], result["teacher"]) == (None, "teacher")
    assert (result["heldout_responses"], result["heldout_unscored"]) == (24, 0)
    reverse, forward, logprob = exact_divergences(folder, result["texts"])
    assert result["heldout_teacher_logprob"] == pytest.approx(logprob, abs=1e-4)
    # The sum over the top-k is exact, so what is left is a small part of k1's error.
    assert result["heldout_reverse_kl"] == pytest.approx(reverse, abs=0.05)
    error = 4 * result["heldout_sampled_reverse_kl_se"]
    assert result["heldout_sampled_reverse_kl"] == pytest.approx(reverse, abs=error)
    assert 0.5 * forward < result["heldout_forward_kl"] <= forward
    assert sum(result["heldout_responses_by_band"]) >= 24
    assert 0 < result["heldout_overlap"] < 1


def test_answers_and_divergences_together(
    folder: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = configuration(folder, "answered", address), folder / "result.json"
    arguments = [str(path), "--checkpoint", str(folder / "teacher"), "--json", str(out)]
    assert cli.main(["eval", *arguments, "--set", "eval.num_prompts=3"]) == 0
    result = json.loads(out.read_text())
    assert result["checkpoint"] == str(folder / "teacher")
    assert result["num_prompts"] == 3
    assert result["ungraded"] == 0
    assert {"avg_at_2", "pass_at_1", "pass_at_2", "mean_tokens"} <= result.keys()
    assert result["pass_at_1"] == pytest.approx(result["avg_at_2"])
    assert result["pass_at_1"] <= result["pass_at_2"]
    # The checkpoint is the teacher: nothing is between them but arithmetic.
    assert abs(result["heldout_reverse_kl"]) < 1e-4
    assert result["heldout_overlap"] == pytest.approx(1.0, abs=0.01)
    assert "warning" not in capsys.readouterr().err


def test_without_a_teacher_the_rest_is_there_and_it_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configuration(folder, "answered", NOWHERE, patience_s=0.1)
    assert cli.main(["eval", "--config", str(path), "--set", "eval.num_prompts=2"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert 0 <= result["accuracy"] <= 1
    assert result["teacher"] is None
    assert not any(name.startswith("heldout_") for name in result)
    assert NOWHERE in result["without_teacher"]
    assert "warning: no held-out divergences without a teacher: " in said.err
    assert cli.main(["eval", str(path), "--teacher", "none", "--set", "eval.num_prompts=1"]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("data", "teacher"), [("unanswered", "auto"), ("answered", "required")])
def test_a_teacher_that_is_needed_and_away_is_an_error(
    folder: Path, data: str, teacher: Any
) -> None:
    config = load_config(configuration(folder, data, NOWHERE, patience_s=0.1))
    with pytest.raises(NotReadyError, match=NOWHERE):
        evaluate_checkpoint(config, str(folder / "student"), teacher=teacher)


def test_a_teacher_of_other_tokens_is_an_error_and_not_an_absent_one(
    folder: Path, address: str, tmp_path: Path
) -> None:
    other = write_tiny_student(tmp_path / "other")
    tokenizer = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer.replace('"a"', '"À"'))
    config = load_config(configuration(folder, "unanswered", address))
    with pytest.raises(FingerprintMismatchError):
        evaluate_checkpoint(config, str(other))


def test_evaluation_without_heldout_problems_says_so(folder: Path) -> None:
    path = configuration(folder, "answered", NOWHERE)
    path.write_text("\n".join(r for r in path.read_text().splitlines() if "heldout" not in r))
    with pytest.raises(DatasetError, match=r"data\.heldout"):
        evaluate_checkpoint(load_config(path), str(folder / "student"))


def test_eval_wants_one_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["a.toml", "--config", "b.toml"]):
        assert cli.main(["eval", *arguments]) == cli.EXIT_LASTING
        assert "eval needs one configuration" in capsys.readouterr().err
