"""What each teacher is asked and how it counts, with real teachers on loopback and real updates.

Run: python -m pytest tests/trainer/test_teachers.py
"""

from __future__ import annotations

import json
import re
import socket
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from student_trainer.assembly import teachers
from student_trainer.assembly.run import assembled
from student_trainer.errors import ConfigError, DatasetError
from student_trainer.learner.batch import collate, split_micro
from student_trainer.losses.objective import merge, objective
from student_trainer.recording.json_lines import read_run
from student_trainer.records import Rollout
from student_trainer.rollouts.stream import LoopThread
from student_trainer.settings.config import TrainerConfig, load_config
from student_trainer.train import train
from teacher_server.engine.hf_engine import HfEngine
from teacher_server.testing import local_teacher, teacher_info
from teacher_wire.errors import FingerprintMismatchError
from teacher_wire.vocabulary import Vocabulary
from tests.trainer.learner.tiny_student import (
    character_tokenizer,
    tiny_student,
    write_tiny_student,
)
from tests.trainer.losses.loss_cases import DIVERGENCES
from tests.trainer.made_rollouts import random_rollout
from tests.trainer.test_train import SETTINGS, InMemoryClient
from tests.waiting import LIMIT_S

CLOSE = 1e-4
ALONE = (
    "run.steps=2",
    "data.heldout=null",
    "rollout.prompts_per_step=4",
    "rollout.rollouts_per_prompt=1",
    "drift.stop_in_flight=false",
    "optim.updates_per_epoch=1",
    "checkpoint.every_steps=null",
)
"""What these runs have otherwise than those of test_train."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and two other models of its kind, `one` and `two`."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "one", "two")):
        write_tiny_student(folder / name, seed=seed)
    return folder


@contextmanager
def served(*folders: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Iterator[list[str]]:
    """Teachers of these models; their addresses."""
    vocabulary = Vocabulary.of(tokenizer or character_tokenizer())
    loop, addresses = LoopThread(), []
    with ExitStack() as stack:
        stack.callback(loop.close)
        for folder in folders:
            engine = HfEngine(
                model=str(folder), dtype="float32", max_context=64, max_k=8, device="cpu"
            )
            loop.run(engine.start())
            stack.callback(lambda engine=engine: loop.run(engine.close()))
            info = replace(
                teacher_info(engine),
                tokenizer_fingerprint=vocabulary.fingerprint,
                token_digests=vocabulary.digests,
            )
            teacher = local_teacher(engine, info=info, vocabulary=vocabulary)
            addresses.append(loop.run(teacher.__aenter__()).address)
            stack.callback(lambda teacher=teacher: loop.run(teacher.__aexit__(None, None, None)))
        yield addresses


def configured(
    tmp_path: Path, models: Path, rows: list[dict[str, object]], *overrides: str
) -> TrainerConfig:
    """A run on these rows, in a folder of its own."""
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "trainer.toml").write_text(SETTINGS.format(out=tmp_path))
    return load_config(
        tmp_path / "trainer.toml", [*ALONE, f"student.model={models / 'student'}", *overrides]
    )


def taken(config: TrainerConfig) -> list[Rollout]:
    """The rollouts of the first step."""
    with assembled(config) as run:
        return run.stream.take(run.stream.rollouts_per_step).rollouts


def check_scores(rollout: Rollout, seed: int, k: int) -> None:
    """The rows are those of the model of that seed, given the teacher's prompt."""
    prompt_ids = rollout.prompt.teacher_prompt_ids
    sequence = torch.from_numpy(np.concatenate([prompt_ids, rollout.response_ids])).long()
    with torch.no_grad():
        logits = tiny_student(seed=seed).eval()(sequence[None]).logits[0, len(prompt_ids) - 1 : -1]
    logprobs = torch.log_softmax(logits, -1)
    own = logprobs[torch.arange(len(rollout)), torch.from_numpy(rollout.response_ids).long()]
    assert np.abs(rollout.teacher.token_logprobs - own.numpy()).max() < CLOSE
    assert rollout.teacher.topk_logprobs.shape == (len(rollout), k)
    assert np.abs(rollout.teacher.topk_logprobs - logprobs.topk(k).values.numpy()).max() < CLOSE


def test_a_teacher_scores_given_its_own_prompt(tmp_path: Path, models: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "1+1=", "teacher_prompt": "it is 2; 1+1="},
        {"prompt": "1+2="},
        {"prompt": "2*2=", "teacher_prompt": "4"},
        {"prompt": "7-2=", "teacher_prompt": "hint 5 hint 5 hint 5#"},
    ]
    with served(models / "one") as (address,):
        config = configured(tmp_path, models, rows, f'teacher.endpoints=["{address}"]')
        rollouts = taken(config)
    assert sorted(len(r.prompt.teacher_prompt_ids) for r in rollouts) == [1, 4, 13, 21]
    assert all(len(r.prompt.token_ids) == 4 for r in rollouts)
    for rollout in rollouts:
        check_scores(rollout, seed=1, k=6)
    # What the learner sees is the student's prompt, and the same response.
    batch = collate(rollouts, torch.device("cpu"))
    assert batch.prompt_lengths_B.tolist() == [4] * 4


TAGGED: list[dict[str, object]] = [
    {"prompt": f"{i}+{i}=", **({"teacher": "two"} if i % 2 else {})} for i in range(4)
]


def at(one: str, two: str) -> tuple[str, str]:
    """Where the teacher of the rows without a name is, and that of the others."""
    return f'teacher.endpoints=["{one}"]', f'teachers.two.endpoints=["{two}"]'


def test_each_row_is_scored_by_its_teacher_with_that_ones_k(tmp_path: Path, models: Path) -> None:
    with served(models / "one", models / "two") as (one, two):
        config = configured(
            tmp_path,
            models,
            TAGGED,
            *at(one, two),
            "teachers.two.k=5",
            "teachers.two.loss_weight=3",
        )
        with assembled(config) as run:
            rollouts = run.stream.take(4).rollouts
            report = run.learner.learn(rollouts, 0)
    assert sorted(str(r.prompt.teacher) for r in rollouts) == ["None", "None", "two", "two"]
    for rollout in rollouts:
        named = rollout.prompt.teacher == "two"
        check_scores(rollout, seed=2 if named else 1, k=5 if named else 6)
        assert rollout.loss_weight == (3.0 if named else 1.0)
    assert np.isfinite(report.loss)


def test_prometheus_is_told_what_the_run_writes_down(tmp_path: Path, models: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with served(models / "one", models / "two") as (one, two):
        config = configured(
            tmp_path, models, TAGGED, *at(one, two), "teachers.two.k=5", f"metrics.port={port}"
        )
        with assembled(config) as run:
            train(run)
            with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT_S) as reply:
                told = reply.read().decode()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(told)
        for sample in family.samples
    }
    first, last = read_run(config.run.out).steps
    assert first.generation is not None
    assert last.generation is not None
    kept = first.generation.kept_tokens + last.generation.kept_tokens
    assert samples["trainer_tokens_total", "kept"] == kept
    assert samples["trainer_steps_total", "step"] == samples[("trainer_done_steps",)] == 2
    assert last.learning is not None
    assert samples[("trainer_step_loss",)] == last.learning.loss
    for table, address in (("teacher", one), ("teachers.two", two)):
        assert samples["trainer_replica_up", address, table] == 1
        assert samples["trainer_teacher_round_trip_seconds_count", table] >= 4


def test_a_teacher_that_no_row_names_is_not_asked(tmp_path: Path, models: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": f"{i}", "teacher": "two"} for i in range(4)]
    with served(models / "two") as (two,):
        # Nobody listens at [teacher]'s address.
        config = configured(
            tmp_path, models, rows, f'teachers.two.endpoints=["{two}"]', "teachers.two.k=8"
        )
        for rollout in taken(config):
            check_scores(rollout, seed=2, k=8)


def test_two_teachers_of_the_same_weights_are_one_to_the_bit(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients: list[InMemoryClient] = []

    async def connect(*_: object) -> InMemoryClient:
        clients.append(InMemoryClient())
        return clients[-1]

    monkeypatch.setattr(teachers, "connect", connect)

    def trained(name: str, rows: list[dict[str, object]], *overrides: str) -> dict[str, object]:
        (tmp_path / name).mkdir()
        config = configured(tmp_path / name, models, rows, *overrides)
        with assembled(config) as run:
            train(run)
            run.finish()
        return load_file(config.run.out / "student" / "model.safetensors")

    named = ('teachers.two.endpoints=["127.0.0.1:2"]', "teachers.two.k=6")
    # The ids of rows without one are their lines: the same in both.
    single = trained("single", [{"prompt": row["prompt"]} for row in TAGGED])
    both = trained("both", TAGGED, *named)
    assert [len(client.sessions) for client in clients] == [8, 4, 4]
    assert all(torch.equal(single[name], both[name]) for name in single)
    heavier = trained("heavier", TAGGED, *named, "teachers.two.loss_weight=2")
    assert any(not torch.equal(single[name], heavier[name]) for name in single)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_teachers_of_different_k_add_up_to_what_each_teaches(name: str) -> None:
    """The gradient of a mixed batch is the weighted sum of those of its rollouts alone."""
    rng = np.random.default_rng(0)
    rollouts = [
        replace(
            random_rollout(rng, num_response=length, k=k),
            loss_weight=weight,
            behavior_logprobs_at_teacher_topk=np.full((length, k), -3.0, np.float32),
        )
        for length, k, weight in ((5, 4, 1.0), (4, 6, 0.5), (6, 4, 2.0), (3, 6, 1.0))
    ]
    parts = split_micro(rollouts, 1000)
    assert [[r.teacher.topk_ids.shape[1] for r in part] for part in parts] == [[4, 4], [6, 6]]
    assert split_micro(rollouts[:1] + rollouts[2:3], 1000) == [[rollouts[0], rollouts[2]]]

    def gradient(micro_batches: list[list[Rollout]], *, weighted: bool) -> torch.Tensor:
        model = tiny_student(seed=3)
        sums = []
        for micro in micro_batches:
            batch = collate(micro, torch.device("cpu"))
            outside = DIVERGENCES[name].needs.mass_outside  # type: ignore[attr-defined]
            gathered = batch.forward(model, temperature=1.0, mass_outside=outside)
            inputs = batch.loss_inputs(gathered)
            weights = batch.loss_weights_B if weighted else None
            part = objective(inputs, divergence=DIVERGENCES[name], loss_weights_B=weights)
            part.loss_sum.backward()
            sums.append(part.detached())
        assert merge(sums).num_tokens.item() == sum(len(r) for m in micro_batches for r in m)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    alone = sum(r.loss_weight * gradient([[r]], weighted=False) for r in rollouts)
    mixed = gradient(parts, weighted=True)
    assert isinstance(alone, torch.Tensor)
    assert torch.allclose(mixed, alone, atol=2e-5 * float(alone.abs().max()))


def test_a_teacher_of_another_tokenizer_is_refused_by_name(tmp_path: Path, models: Path) -> None:
    other = character_tokenizer()
    other.add_tokens(["<one>", "<two>", "<three>"])
    with served(models / "one") as (one,), served(models / "two", tokenizer=other) as (two,):
        config = configured(
            tmp_path,
            models,
            TAGGED,
            *at(one, two),
            "teachers.two.k=6",
        )
        with pytest.raises(FingerprintMismatchError, match=r"^\[teachers\.two\]: "):
            taken(config)


def test_limits_of_a_teacher_are_named_with_its_table(tmp_path: Path, models: Path) -> None:
    with served(models / "one", models / "two") as (one, two):
        config = configured(
            tmp_path,
            models,
            TAGGED,
            *at(one, two),
            "teachers.two.k=9",
        )
        with pytest.raises(ConfigError, match=r"^teachers\.two\.k is 9, the teacher .* allows 8"):
            taken(config)


def test_an_unknown_teacher_is_refused_by_row_before_anything_starts(
    tmp_path: Path, models: Path
) -> None:
    config = configured(tmp_path, models, [{"prompt": "1"}, {"prompt": "2", "teacher": "law"}])
    with pytest.raises(DatasetError, match=r"train\.jsonl:2: teacher 'law' has no table"):
        taken(config)


def test_a_run_says_that_end_tokens_differ_and_saves_all_of_them(
    tmp_path: Path,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The base student of an instruct teacher."""
    student = tmp_path / "base"
    write_tiny_student(student)
    (student / "generation_config.json").write_text('{"eos_token_id": 0}')
    client = InMemoryClient()
    client.info = replace(client.info, end_token_ids=(7,))

    async def connect(*_: object) -> InMemoryClient:
        return client

    monkeypatch.setattr(teachers, "connect", connect)
    rows: list[dict[str, object]] = [{"prompt": f"{i}"} for i in range(4)]
    own = f"student.model={student}"
    config = configured(tmp_path, models, rows, own, "run.steps=1")
    with assembled(config) as run:
        train(run)
        run.finish()
    said = " ".join(capsys.readouterr().out.split())
    assert "student's tokenizer ends with '<eos>' (1), its generation_config with '<pad>'" in said
    assert "[teacher]: the teacher ends with '5' (7), at which no rollout ends" in said
    saved = json.loads((config.run.out / "student" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, 1]
    with_name = configured(tmp_path, models, rows, own, 'rollout.stop_tokens=["5"]')
    with assembled(replace_out(with_name, tmp_path / "second")) as run:
        assert "the teacher ends" not in capsys.readouterr().out
        rollouts = run.stream.take(4).rollouts
    for rollout in rollouts:
        ends = np.flatnonzero(np.isin(rollout.response_ids, [0, 1, 7]))
        assert ends.tolist() in ([], [len(rollout) - 1])


def replace_out(config: TrainerConfig, out: Path) -> TrainerConfig:
    """The same run in another folder."""
    return config.model_copy(update={"run": config.run.model_copy(update={"out": out})})


def test_stop_strings_end_the_rollouts_of_a_run(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect(*_: object) -> InMemoryClient:
        return InMemoryClient()

    monkeypatch.setattr(teachers, "connect", connect)
    rows: list[dict[str, object]] = [{"prompt": f"{i}"} for i in range(8)]
    stops = ["a", "b", "c", "d", "e", "f", "1", "2"]
    config = configured(
        tmp_path,
        models,
        rows,
        "rollout.prompts_per_step=8",
        f"rollout.stop_strings={json.dumps(stops)}",
    )
    rollouts = taken(config)
    tokenizer = character_tokenizer()

    def has_one(token_ids: list[int]) -> bool:
        text = tokenizer.decode(token_ids)
        return any(stop in text for stop in stops)

    ended = [ids for r in rollouts if has_one(ids := r.response_ids.tolist())]
    assert len(ended) > 2
    assert not any(has_one(ids[:-1]) for ids in ended)


HOST = 'teachers.x.endpoints=["h:1"]'


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["teachers.x.k=5"], "teachers.x.endpoints: Field required"),
        (["teachers.x.endpoint=[]"], "did you mean 'endpoints'"),
        (
            [HOST, "teachers.x.k=2"],
            "drift.k is 4, more than the teachers.x.k 2",
        ),
        ([HOST, "teachers.x.loss_weight=0"], "teachers.x.loss_weight: "),
        (
            [HOST, "teachers.x.drift.k=3"],
            "teachers.x.drift.k is 3 and drift.k 4: overlaps of different sizes",
        ),
        (
            [
                HOST,
                'teachers.x.drift={"k": 4, "w_drop": 0.5}',
                "drift.w_drop=0.01",
                "weights.prune={}",
            ],
            "teachers.x.drift.w_drop is 0.5 and drift.w_drop 0.01: weights.prune",
        ),
        (['teachers={"a b": {"endpoints": ["h:1"]}}'], "teachers.a b"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused_by_the_configuration(
    tmp_path: Path, models: Path, overrides: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(tmp_path, models, TAGGED, *overrides)
    assert reason in str(caught.value)


def test_the_teachers_of_the_guide_are_a_configuration(tmp_path: Path, models: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    config = configured(tmp_path, models, TAGGED)
    given = {**config.model_dump(exclude_unset=True), **tomllib.loads(block)}
    given["rollout"]["student_topk"] = given["drift"]["k"] = 8
    made = TrainerConfig.model_validate(given)
    assert made.teachers["code"].loss_weight == 0.5
    assert (made.drift_of("code").k, made.drift_of("code").threshold) == (8, 0.6)


def test_a_teacher_may_have_a_drift_policy_of_its_own(tmp_path: Path, models: Path) -> None:
    own = '{"k": 4, "metric": "teacher_top_p_accept", "top_p": 0.9, "stop_in_flight": true}'
    config = configured(tmp_path, models, TAGGED, HOST, f"teachers.x.drift={own}")
    assert teachers.drift_policy(config).metric.name == "overlap_ratio"
    policy = teachers.drift_policy(config, "x")
    assert (policy.metric.name, policy.stop_in_flight) == ("teacher_top_p_accept", True)
