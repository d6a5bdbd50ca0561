"""The whole trainer in one process: reference sampler, a teacher in memory, real updates.

Only the connection to the teacher is replaced. Run: python -m pytest tests/trainer/test_train.py
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from student_trainer.assembly import from_settings, teachers
from student_trainer.assembly.run import Run, assembled
from student_trainer.errors import CheckpointError, ConfigError, DatasetError, WeightSyncError
from student_trainer.recording.json_lines import read_lines
from student_trainer.recording.run_folder import read_record
from student_trainer.records import Rollout
from student_trainer.rollouts.samplers.hf_sampler import HfSampler
from student_trainer.rollouts.stream import RolloutStream, Taken
from student_trainer.settings.config import TrainerConfig, load_config
from student_trainer.train import train
from teacher_wire.errors import EngineError
from teacher_wire.fingerprint import tokenizer_fingerprint
from teacher_wire.records import DriftPolicy, ScoreOptions, Scores, TeacherInfo, TokenSpan
from tests.rounds import ROUNDS
from tests.trainer.in_memory import ScriptedSession
from tests.trainer.learner.tiny_student import (
    VOCAB_SIZE,
    character_tokenizer,
    tiny_student,
    write_tiny_student,
)

INFO = TeacherInfo(
    model_id="in-memory",
    revision="",
    weights_digest="",
    dtype="float32",
    vocab_size=VOCAB_SIZE,
    tokenizer_fingerprint=tokenizer_fingerprint(character_tokenizer()),
    special_token_ids=(),
    max_k=8,
    max_context=64,
    engine="in-memory",
    engine_version="",
    instance_id="",
    max_sessions=100,
    max_append_tokens=5,
)


class ModelSession(ScriptedSession):
    """Rows of a real model, computed anew for every append; stops after five bad events."""

    def __init__(
        self, model: torch.nn.Module, prompt_ids: NDArray[np.int32], options: ScoreOptions
    ) -> None:
        super().__init__()
        self._model, self._options = model, options
        self._sequence = prompt_ids.tolist()

    async def append(self, span: TokenSpan) -> Scores:
        scores = await super().append(span)
        start = len(self._sequence) - 1
        self._sequence += span.token_ids.tolist()
        with torch.no_grad():
            logits = self._model(torch.tensor([self._sequence])).logits[0, start:-1]
        logprobs = torch.log_softmax(logits / self._options.temperature, -1)
        topk = logprobs.topk(self._options.k)
        rows = replace(
            scores.rows,
            topk_ids=topk.indices.int().numpy(),
            topk_logprobs=topk.values.numpy(),
            token_logprobs=logprobs.gather(1, torch.from_numpy(span.token_ids).long()[:, None])[
                :, 0
            ].numpy(),
            candidate_logprobs=None
            if span.candidate_ids is None
            else logprobs.gather(1, torch.from_numpy(span.candidate_ids).long()).numpy(),
            entropies=torch.special.entr(logprobs.exp()).sum(-1).numpy()
            if self._options.want_entropy
            else None,
        )
        return replace(scores, rows=rows)


class InMemoryClient:
    """Opens sessions over another tiny student; fails at session number `fail_at`."""

    info = INFO

    def __init__(self, fail_at: int | None = None) -> None:
        self._model = tiny_student(seed=1).eval()
        self._fail_at = fail_at
        self.sessions: list[ModelSession] = []
        self.closed = False

    def open(
        self, prompt_ids: NDArray[np.int32], options: ScoreOptions, policy: DriftPolicy
    ) -> ModelSession:
        if len(self.sessions) == self._fail_at:
            raise EngineError("the teacher died")
        self.sessions.append(ModelSession(self._model, prompt_ids, options))
        return self.sessions[-1]

    async def aclose(self) -> None:
        self.closed = True


SETTINGS = """
[run]
out = "{out}/run"
steps = 4
[student]
model = "{out}/student"
device = "cpu"
[sampler]
kind = "hf"
[data]
train = "{out}/train.jsonl"
heldout = "{out}/train.jsonl"
[rollout]
prompts_per_step = 3
rollouts_per_prompt = 2
student_topk = 4
chunk_tokens = 4
max_context = 40
[teacher]
endpoints = ["127.0.0.1:1"]
k = 6
[drift]
k = 4
threshold = 0.7
w_drop = 0.01
[budget]
kind = "fixed"
max_tokens = 10
[loss]
kind = "local_support_matching"
[optim]
learning_rate = 3e-3
micro_batch_tokens = 40
updates_per_epoch = 2
[eval]
every_steps = 2
num_prompts = 2
pass_k = 2
max_tokens = 6
answer_pattern = '(\\w)'
[checkpoint]
every_steps = 2
"""


DEFAULT_LOSS = ["loss.kind=local_support_matching"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A student, problems and settings."""
    return prepared(tmp_path)


def prepared(folder: Path) -> Path:
    """The folder with a student, problems and settings."""
    write_tiny_student(folder / "student")
    lines = [json.dumps({"prompt": f"{i}+{i}=", "answer": "7"}) for i in range(6)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "trainer.toml").write_text(SETTINGS.format(out=folder))
    return folder


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> InMemoryClient:
    """The teacher that every run below gets."""
    made = InMemoryClient()
    connect_to(made, monkeypatch)
    return made


def connect_to(client: InMemoryClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(*_: object) -> InMemoryClient:
        return client

    monkeypatch.setattr(teachers, "connect", connect)


def configured(folder: Path, *overrides: str) -> TrainerConfig:
    return load_config(folder / "trainer.toml", overrides)


def run_through(config: TrainerConfig, **start: Any) -> dict[str, torch.Tensor]:
    """Trains, started as `assembled` is told, and returns the weights that were saved."""
    with assembled(config, **start) as run:
        train(run)
        run.finish()
    return load_file(config.run.out / "student" / "model.safetensors")


def records(config: TrainerConfig, kind: str) -> list[dict[str, float]]:
    return [r for r in read_lines(config.run.out / "metrics.jsonl") if r["kind"] == kind]


def test_run_learns_and_writes_everything_down(folder: Path, client: InMemoryClient) -> None:
    config = configured(folder, "run.steps=12", "optim.epochs=2", "eval.every_steps=4")
    run_through(config)
    steps, evals = records(config, "step"), records(config, "eval")
    assert [s["step"] for s in steps] == list(range(1, 13))
    assert [e["step"] for e in evals] == [0, 4, 8, 12]
    assert {"avg_at_2", "pass_at_2"} <= evals[0].keys() & evals[-1].keys()
    assert "pass_at_2" not in evals[1]
    assert all(e["heldout_responses"] == 2 and e["heldout_unscored"] == 0 for e in evals)
    # The student comes nearer to the teacher; by how much is a matter of the learning rate.
    losses = [s["loss"] for s in steps]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert all(s["sync_gap_nats"] < 1e-4 for s in steps)
    assert all(s["updates"] == 4 for s in steps)
    assert all(s["rollouts"] == 6 and s["kept_tokens"] <= 60 for s in steps)
    assert all(s["staleness_min_version"] == s["step"] - 1 for s in steps)
    assert len(read_lines(config.run.out / "profiles.jsonl")) == 12
    (start,) = read_record(config.run.out)["starts"]
    assert start["probe_nats"].keys() == {"plain", "loaded", "changed", "pushed"}
    assert max(start["probe_nats"].values()) < 1e-4
    assert client.closed
    assert len(client.sessions) == 12 * 6 + 4 * 2
    assert all(session.num_closed == 1 for session in client.sessions)
    spans = [len(span) for session in client.sessions for span in session.spans]
    assert max(spans) <= INFO.max_append_tokens


def test_a_sampler_that_computes_the_student_otherwise_ends_the_run_before_anything_is_asked(
    folder: Path, client: InMemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Otherwise(HfSampler):
        async def start(self) -> None:
            await super().start()
            for layer in self._model().model.layers:
                layer.self_attn.scaling *= 2

    monkeypatch.setattr(from_settings, "HfSampler", Otherwise)
    with pytest.raises(WeightSyncError, match=r"as it loaded .* nats, more than 0\.001 .*qwen3"):
        run_through(configured(folder))
    assert client.sessions == []


DOCUMENTED = Path(__file__).parents[2] / "docs" / "diagnostics.md"


class StoppingClient(InMemoryClient):
    """Its sessions end a response after six tokens."""

    def open(
        self, prompt_ids: NDArray[np.int32], options: ScoreOptions, policy: DriftPolicy
    ) -> ModelSession:
        session = super().open(prompt_ids, options, policy)
        session._truncate_at = 6
        return session


def logged(config: TrainerConfig) -> list[dict[str, object]]:
    """Everything that a run wrote down."""
    run_through(config)
    names = ("metrics.jsonl", "profiles.jsonl")
    return [record for name in names for record in read_lines(config.run.out / name)]


def test_every_logged_metric_is_explained_and_every_explained_one_is_logged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = re.findall(r"^\| (`.*?) \|", DOCUMENTED.read_text(), re.MULTILINE)
    explained = {
        name: "optional" in row
        for row in rows
        for name in re.findall(r"`(\w+)`", row.split(" (optional")[0])
    }
    connect_to(InMemoryClient(), monkeypatch)
    plain = logged(configured(folder, "run.steps=2"))
    connect_to(StoppingClient(), monkeypatch)
    path = folder / "trainer.toml"
    fixed, prune = (
        'kind = "fixed"\nmax_tokens = 10',
        'kind = "prune"\ninitial = 10\nminimum = 5\nmaximum = 10',
    )
    path.write_text(path.read_text().replace(fixed, prune))
    weights = ("weights.prune.w_base=0.5", "weights.prefix_importance.gamma=0.5")
    rounds = ("sampler.dtype=bfloat16", f"run.out={folder}/methods")
    methods = logged(configured(folder, "run.steps=2", *rounds, *weights))
    plain, methods = ([_named(record) for record in records] for records in (plain, methods))
    always, ever = (set[str]().union(*records) for records in (plain, [*plain, *methods]))
    assert sorted(ever - explained.keys()) == []
    assert sorted(explained.keys() - ever) == []
    assert sorted(name for name in explained if not explained[name] and name not in always) == []
    assert any(record.get("kind") == "warning" for record in methods)


def _named(record: dict[str, object]) -> dict[str, object]:
    """As the documentation has it: `pass_at_k` for every k."""
    return {re.sub(r"_at_\d+$", "_at_k", name): value for name, value in record.items()}


def test_rollouts_that_the_teacher_missed_are_counted_and_warned_of(
    folder: Path, client: InMemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(folder, "run.steps=1")
    with assembled(config) as run:
        taken = replace(taken_by(run), num_unscored=2)
        monkeypatch.setattr(RolloutStream, "take", lambda *_: taken)
        train(run)
    (step,) = records(config, "step")
    assert step["unscored_rollouts"] == 2
    assert "unscored" in [record["warning"] for record in records(config, "warning")]


def test_queue_of_one_is_one_step_stale_and_generates_no_more(
    folder: Path, client: InMemoryClient
) -> None:
    config = configured(folder, "rollout.max_staleness=1")
    run_through(config)
    assert [s["staleness_min_version"] for s in records(config, "step")] == [0, 0, 1, 2]
    # Three evaluations beside them.
    assert len(client.sessions) == 4 * 6 + 3 * 2


def test_run_that_died_and_was_resumed_equals_one_that_did_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect_to(InMemoryClient(), monkeypatch)
    straight_config = configured(folder, f"run.out={folder}/straight")
    straight = run_through(straight_config)

    config = configured(folder)
    connect_to(InMemoryClient(fail_at=2 + 2 * 6 + 2 + 6 + 2), monkeypatch)
    with pytest.raises(EngineError, match="the teacher died"):
        run_through(config)
    assert [s["step"] for s in records(config, "step")] == [1, 2, 3]
    connect_to(InMemoryClient(), monkeypatch)
    resumed = run_through(config, resume=True)

    assert resumed.keys() == straight.keys()
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name
    steps, expected = records(config, "step"), records(straight_config, "step")
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "learning_rate", "kept_tokens", "reverse_kl"):
        assert [s[name] for s in steps] == [s[name] for s in expected]


def test_resuming_without_a_checkpoint_is_refused(folder: Path, client: InMemoryClient) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        run_through(configured(folder), resume=True)


def taken_by(run: Run) -> Taken:
    """The rollouts of the next step."""
    return run.stream.take(run.stream.rollouts_per_step)


def learnt(run: Run, rollouts: list[Rollout]) -> dict[str, torch.Tensor]:
    run.learner.learn(rollouts, 0)
    return {name: tensor.clone() for name, tensor in run.learner.weights()}


@pytest.mark.parametrize(
    "overrides",
    [
        DEFAULT_LOSS,
        ["loss.kind=sampled_reverse_kl", "weights.prefix_importance.gamma=0.5"],
        ["loss.kind=student_topk_reverse_kl", "weights.prune.w_base=0.5"],
        ["loss.kind=sampled_reverse_kl", "weights.block_gate.block_size=2"],
        [
            "loss.kind=forward_kl",
            "weights.entropy_top.ratio=0.5",
            'weights.block_gate={"granularity":"newline","min_span":1,"max_span":3}',
        ],
        ["loss.support=student_topk_and_sampled"],
        ["loss.kind=student_topk_reverse_kl", "loss.support=union"],
        ["loss.kind=generalized_jsd"],
        ["loss.kind=entropy_aware_kl"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_learning_is_the_same_whatever_the_micro_batch(
    folder: Path, client: InMemoryClient, overrides: list[str]
) -> None:
    results = []
    # Each alone, and all at once; some together for the default loss, for all in the long round.
    between = (30,) if ROUNDS.every_process or overrides == DEFAULT_LOSS else ()
    for number, tokens in enumerate((1, *between, 100_000)):
        config = configured(
            folder, *overrides, f"optim.micro_batch_tokens={tokens}", f"run.out={folder}/{number}"
        )
        with assembled(config) as run:
            results.append(learnt(run, taken_by(run).rollouts))
    start = tiny_student().state_dict()
    for name, tensor in results[0].items():
        for other in results[1:]:
            # Two updates of AdamW at 3e-3 each: where a gradient is near 0 its sign decides, so
            # most entries are compared and not the worst one.
            assert (other[name] - tensor).abs().median() < 1e-6, name
    moved = sum((results[0][name] - start[name]).abs().sum().item() for name in start)
    assert moved > 1


def test_learning_is_the_same_with_checkpointing_and_follows_it_in_bfloat16(
    folder: Path, client: InMemoryClient
) -> None:
    results = []
    saves = "student.gradient_checkpointing=true"
    for number, overrides in enumerate(([], [saves], [saves, "student.dtype=bfloat16"])):
        config = configured(folder, *overrides, f"run.out={folder}/{number}")
        with assembled(config) as run:
            results.append(learnt(run, taken_by(run).rollouts))
    plain, saving, rounded = results
    start = tiny_student().state_dict()
    for name, tensor in plain.items():
        assert (saving[name] - tensor).abs().median() < 1e-6, name
        assert rounded[name].dtype == torch.float32
    exact, other = (
        torch.cat([(result[name] - start[name]).flatten() for name in start])
        for result in (plain, rounded)
    )
    assert torch.cosine_similarity(exact, other, dim=0) > 0.95
    assert not torch.equal(exact, other)


@pytest.mark.parametrize(
    "loss",
    [
        '{"kind":"local_support_matching"}',
        '{"kind":"local_support_matching","support":"teacher_topk_and_sampled"}',
        '{"kind":"truncated_reverse_kl","tail":true}',
        '{"kind":"forward_kl"}',
        '{"kind":"generalized_jsd"}',
        '{"kind":"entropy_aware_kl"}',
        '{"kind":"sampled_reverse_kl"}',
        '{"kind":"student_topk_reverse_kl","support":"only_tch"}',
    ],
)
def test_a_nucleus_smaller_than_the_candidates_collects_none(
    folder: Path, client: InMemoryClient, loss: str
) -> None:
    """At 0.1 a nucleus holds one or two tokens, and the default asks for sixteen."""
    config = configured(
        folder,
        f"loss={loss}",
        "rollout.top_p=0.1",
        "rollout.student_topk=16",
        'drift={"metric":"teacher_top_p_accept","k":4,"top_p":0.9}',
        "run.steps=1",
        "data.heldout=null",
    )
    with assembled(config) as run:
        train(run)
    (step,) = records(config, "step")
    assert step["kept_tokens"] > 0
    spans = [span for session in client.sessions for span in session.spans]
    assert spans
    assert all(span.candidate_ids is None for span in spans)


def test_gradient_is_a_mean_over_tokens_and_not_a_sum(folder: Path, client: InMemoryClient) -> None:
    config = configured(folder, "optim.updates_per_epoch=1")
    norms = []
    for copies in (1, 3):
        with assembled(config) as run:
            rollouts = taken_by(run).rollouts * copies
            norms.append(run.learner.learn(rollouts, 0).grad_norm)
    # 1e-5: float32 sums in another order.
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_texts_without_answers_are_evaluated_by_the_teacher(
    folder: Path, client: InMemoryClient
) -> None:
    rows = [json.dumps({"prompt": f"say {i} "}) for i in range(3)]
    (folder / "heldout.jsonl").write_text("\n".join(rows))
    config = configured(folder, f"data.heldout={folder}/heldout.jsonl", "run.steps=2")
    run_through(config)
    evals = records(config, "eval")
    assert [e["step"] for e in evals] == [0, 2]
    assert not any("accuracy" in e or "pass_at_2" in e for e in evals)
    assert all(e["heldout_responses"] == 2 and e["heldout_forward_kl"] > 0 for e in evals)
    texts = read_lines(config.run.out / "samples" / "evaluations.jsonl")
    assert [(t["step"], t["prompt"]) for t in texts] == [
        (step, f"say {i} ") for step in (0, 2) for i in (0, 1)
    ]
    assert all(t["teacher_logprob"] < 0 for t in texts)
    rollouts = read_lines(config.run.out / "samples" / "rollouts.jsonl")
    assert [t["step"] for t in rollouts] == [1] * 4 + [2] * 4


def test_answers_that_cannot_be_right_are_named_before_anything_is_loaded(folder: Path) -> None:
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "44", "id": "row 2"}]
    (folder / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = configured(
        folder, f"data.heldout={folder}/heldout.jsonl", f"student.model={folder}/student"
    )
    (folder / "student" / "model.safetensors").unlink()
    with pytest.raises(DatasetError, match=r"^row 2: the answer '44' .*eval\.answer_pattern"):
        run_through(config)


def test_problems_that_nobody_could_judge_are_refused(folder: Path) -> None:
    (folder / "heldout.jsonl").write_text(json.dumps({"prompt": "1"}))
    config = configured(folder, f"data.heldout={folder}/heldout.jsonl", "eval.teacher_samples=0")
    with pytest.raises(ConfigError, match=r"heldout\.jsonl:1: .*eval\.teacher_samples is 0"):
        run_through(config)


def test_prompt_that_leaves_no_room_for_the_budget_is_refused(folder: Path) -> None:
    config = configured(folder, "budget.max_tokens=37")
    with pytest.raises(DatasetError, match=r"train\.jsonl:1: the prompt has 4 tokens.* 1 to 3"):
        from_settings.problems(config, character_tokenizer())


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("teacher.k=9", r"teacher\.k is 9, the teacher in-memory allows 8"),
        ("rollout.student_topk=9", r"rollout\.student_topk is 9, .* allows 8"),
        ("rollout.max_context=65", r"rollout\.max_context is 65, .* allows 64"),
        ("rollout.chunk_tokens=6", r"rollout\.chunk_tokens is 6, .* allows 5"),
    ],
)
def test_setting_beyond_the_teachers_limits_is_refused(
    folder: Path, override: str, reason: str
) -> None:
    teachers.check_limits(configured(folder), INFO)
    with pytest.raises(ConfigError, match=reason):
        teachers.check_limits(configured(folder, override), INFO)


def test_special_token_that_the_vocabulary_lacks_is_refused(folder: Path) -> None:
    config = configured(folder, 'special_tokens.tokens=["#", "<nope>"]')
    with pytest.raises(ConfigError, match="'<nope>' is not in the vocabulary"):
        from_settings.special_tokens(config, character_tokenizer())
