"""Several answers in one rollout, with a real student and a real teacher on loopback.

Run: python -m pytest tests/trainer/test_conversations.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from student_trainer.assembly import from_settings
from student_trainer.assembly.run import assembled
from student_trainer.errors import DatasetError
from student_trainer.records import Finish, Rollout
from student_trainer.settings.config import TrainerConfig
from student_trainer.train import take_step, train
from tests.trainer.learner.tiny_student import EOS_ID, character_tokenizer, tiny_student
from tests.trainer.test_teachers import CLOSE, check_scores, configured, models, served

__all__ = ["models"]

TEMPLATE = (
    "{% for m in messages %}{{ '>' if m.role == 'assistant' else '#' }}{{ m.content }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
ROWS: list[dict[str, object]] = [
    {
        "messages": [{"role": "user", "content": f"{i} + {i}"}],
        "turns": [{"role": "user", "content": "sure"}, {"role": "tool", "content": f"{2 * i}"}],
        "answer": "7",
        **({"teacher_prompt": "it is 8"} if i % 2 else {}),
    }
    for i in range(4)
]
ENDS = 'rollout.stop_tokens=["a","b","c","d","e","f","0","1","2","3","4","5"]'
"""So many that an answer ends soon."""
PRUNED = {"kind": "prune", "minimum": 4, "increment": 1, "margin": 1}


def own_logprobs(rollout: Rollout) -> np.ndarray:
    """Of the model that sampled, in one pass over everything."""
    ids = np.concatenate([rollout.prompt.token_ids, rollout.response_ids])
    with torch.no_grad():
        logits = tiny_student().eval()(torch.from_numpy(ids).long()[None]).logits[0]
    rows = logits[len(rollout.prompt.token_ids) - 1 : -1].log_softmax(-1)
    at = torch.arange(len(rollout)), torch.from_numpy(rollout.response_ids).long()
    return np.asarray(rows[at])


def talking(folder: Path, models: Path, address: str, *overrides: str) -> TrainerConfig:
    """A run over ROWS with one teacher, in which answers end soon."""
    template = folder / "chat.jinja"
    template.write_text(TEMPLATE)
    return configured(
        folder,
        models,
        ROWS,
        f'teacher.endpoints=["{address}"]',
        f"data.chat_template={template}",
        "rollout.max_context=60",
        ENDS,
        *overrides,
    )


def test_a_conversation_is_sampled_scored_and_learnt_from(tmp_path: Path, models: Path) -> None:
    with served(models / "one") as (address,):
        config = talking(
            tmp_path, models, address, "budget.max_tokens=30", "rollout.rollouts_per_prompt=3"
        )
        with assembled(config) as run:
            rollouts = run.stream.take(run.stream.rollouts_per_step).rollouts
            report = run.learner.learn(rollouts, 0)
    assert np.isfinite(report.loss)
    decode = character_tokenizer().decode
    talks = [r for r in rollouts if r.sampled is not None and r.finish is Finish.STOP]
    assert len(talks) > 3
    assert any(len(r.prompt.teacher_prompt_ids) == len("it is 8") for r in talks)
    for rollout in rollouts:
        check_scores(rollout, seed=1, k=6)
        sampled = np.ones(len(rollout), bool) if rollout.sampled is None else rollout.sampled
        gaps = np.abs(rollout.behavior_logprobs - own_logprobs(rollout))[sampled]
        assert gaps.max() < CLOSE
        assert rollout.num_generated == sampled.sum() == rollout.mask.sum()
        assert not rollout.teacher.bad_events[~sampled].any()  # type: ignore[index]
    for talk in talks:
        said = "".join(
            decode([token]) if own else f"({decode([token])})"
            for token, own in zip(talk.response_ids, talk.sampled, strict=True)  # type: ignore[arg-type]
        ).replace(")(", "")
        number = talk.prompt.text[1]
        for turn in ("sure", str(2 * int(number))):
            # After an end token of the template's own, or of the run's, which the turn closes.
            assert f"<eos>(#{turn}<eos>>)" in said or f"(<eos>#{turn}<eos>>)" in said
        assert EOS_ID in talk.response_ids


def test_an_evaluation_grades_the_last_answer(tmp_path: Path, models: Path) -> None:
    with served(models / "one") as (address,):
        config = talking(
            tmp_path,
            models,
            address,
            f"data.heldout={tmp_path / 'train.jsonl'}",
            "budget.max_tokens=30",
            "eval.max_tokens=30",
            "run.steps=1",
        )
        with assembled(config) as run:
            train(run)
    lines = (tmp_path / "run" / "samples" / "evaluations.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert answers
    for answer in answers:
        assert "#sure" not in answer["response"]
        assert len(answer["response"]) <= answer["tokens"] < 30
    whole = (tmp_path / "run" / "samples" / "rollouts.jsonl").read_text()
    assert "#sure" in whole


def test_a_budget_that_is_used_up_by_turns_too_is_used_up(tmp_path: Path, models: Path) -> None:
    """The turns are longer than the margin, and R never reaches 0."""
    with served(models / "one") as (address,):
        config = talking(
            tmp_path,
            models,
            address,
            f"budget={json.dumps({**PRUNED, 'initial': 24, 'maximum': 30})}",
            "drift.w_drop=0.001",
            "rollout.rollouts_per_prompt=3",
        )
        with assembled(config) as run:
            rollouts = run.stream.take(run.stream.rollouts_per_step)
            run.stream.take = lambda _: rollouts  # type: ignore[method-assign]
            report = take_step(run, 0)
    lengths = [len(rollout) for rollout in rollouts.rollouts]
    answers = [rollout.num_sampled for rollout in rollouts.rollouts]
    assert report.generation is not None
    assert report.generation.effective_length_mean == np.mean(answers)
    assert max(answers) < 23 <= max(lengths)
    assert report.budget_hit_share == np.mean([length >= 23 for length in lengths])
    assert report.max_tokens == 25


@pytest.mark.parametrize(
    ("where", "budget"),
    [
        ("train", {**PRUNED, "initial": 10, "maximum": 15}),
        ("held", {"kind": "fixed", "max_tokens": 30}),
    ],
)
def test_turns_that_can_never_be_said_are_refused_where_the_data_is_read(
    where: str, budget: dict[str, object], tmp_path: Path, models: Path
) -> None:
    """Were they not, the first answer would be graded as the last."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    config = configured(
        tmp_path,
        models,
        ROWS if where == "train" else [{"prompt": "1+1="}],
        f"data.chat_template={tmp_path / 'chat.jinja'}",
        f"data.heldout={tmp_path / 'held.jsonl'}",
        f"budget={json.dumps(budget)}",
        "rollout.max_context=60",
        "eval.max_tokens=15",
    )
    reason = rf"{where}\.jsonl:1: turns of 13 tokens and one for each of 3 answers do not fit in 15"
    with pytest.raises(DatasetError, match=reason):
        from_settings.problems(config, character_tokenizer())
