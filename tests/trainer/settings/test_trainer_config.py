"""Settings: what is refused and why."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from student_trainer.assembly.from_settings import max_sync_gap_nats
from student_trainer.assembly.methods import budget, divergence
from student_trainer.assembly.teachers import drift_policy, score_options
from student_trainer.errors import ConfigError
from student_trainer.losses.divergences import (
    ForwardKL,
    GeneralizedJSD,
    LocalSupportMatching,
    TruncatedReverseKL,
)
from student_trainer.losses.entropy_aware import EntropyAwareKL
from student_trainer.losses.objective import Divergence
from student_trainer.losses.policy_gradients import SampledReverseKL, StudentTopKReverseKL
from student_trainer.settings.config import TrainerConfig, load_config
from teacher_wire.drift import bad_event_budget
from teacher_wire.drift_metrics import METRICS, OverlapRatio, TeacherTopPAccept
from teacher_wire.records import DriftPolicy
from tests.trainer.settings.smallest_config import SMALLEST

CONFIGS = Path(__file__).parents[3] / "configs"
SHARED = 'sampler={"kind":"hf_batched","weights":"shared"}'
TOPK_LOSS = ["loss.kind=student_topk_reverse_kl", "drift.metric=teacher_top_p_accept"]
V2_LOSS = ["loss.support=student_topk_and_sampled", "drift.metric=teacher_top_p_accept"]


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    """A file with every required setting and next to nothing else."""
    path = tmp_path / "trainer.toml"
    path.write_text(SMALLEST, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("trainer-*.toml")), ids=lambda p: p.name)
def test_published_configuration_loads(path: Path) -> None:
    assert isinstance(load_config(path), TrainerConfig)


def test_there_is_a_published_configuration() -> None:
    assert list(CONFIGS.glob("trainer-*.toml"))


def test_the_rule_of_who_says_nothing_fits_language(smallest: Path) -> None:
    """With the paper's 16 and 0.7 nearly a third of the events of a student that lacks one layer of
    thirty are bad, with 8 and 0.5 3 %; bad events at a third of the budget end a rollout."""
    config = load_config(smallest)
    assert drift_policy(config) == DriftPolicy(
        metric=OverlapRatio(k=8, threshold=0.5), w_drop=3 / 100, stop_in_flight=True
    )
    assert config.teacher.k == 64
    nucleus = load_config(smallest, ["drift.metric=teacher_top_p_accept"])
    assert drift_policy(nucleus).metric == TeacherTopPAccept(k=64, top_p=0.95)


@pytest.mark.parametrize(
    ("overrides", "w_drop"),
    [
        ("budget.max_tokens=2", 1.0),
        ("budget.max_tokens=64", 3 / 64),
        ('budget={"kind":"prune","initial":10,"minimum":10,"maximum":150}', 3 / 10),
        ('budget={"kind":"prune"}', 3 / 2048),
        ('budget={"kind":"quantile","initial":20,"minimum":9,"maximum":150}', 3 / 20),
        (
            'budget={"kind":"progressive","initial":8,"maximum":150,"increment":8,"every_steps":1}',
            3 / 8,
        ),
    ],
)
def test_reliability_lasts_for_a_third_of_the_first_budget(
    smallest: Path, overrides: str, w_drop: float
) -> None:
    given = [overrides, "rollout.max_context=13312"]
    assert drift_policy(load_config(smallest, given)).w_drop == w_drop
    assert drift_policy(load_config(smallest, [*given, "drift.w_drop=0.01"])).w_drop == 0.01


def test_a_budget_does_not_grow_on_bad_events_alone(smallest: Path) -> None:
    """Prune-OPD's controller as it is: every rollout ends where its R is 0, none is a hit."""
    config = load_config(smallest, ['budget={"kind":"prune"}', "rollout.max_context=13312"])
    lengths, stops_at = budget(config), bad_event_budget(drift_policy(config).w_drop)
    for _ in range(60):
        lengths.update([min(lengths.max_tokens, stops_at)] * 8)
    assert lengths.max_tokens == config.budget.minimum  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 1e-3),
        (["student.dtype=bfloat16"], 0.5),
        (["sampler.dtype=bfloat16"], 0.5),
        (['sampler={"kind":"hf"}', "student.dtype=bfloat16"], 0.5),
        (['sampler={"kind":"hf_batched"}'], 1e-3),
        (['sampler={"kind":"hf_batched"}', "student.dtype=bfloat16"], 0.5),
        (["student.dtype=bfloat16", "optim.max_sync_gap_nats=0.2"], 0.2),
    ],
)
def test_the_gap_that_a_sync_may_leave_is_of_the_arithmetic(
    smallest: Path, overrides: list[str], expected: float
) -> None:
    assert max_sync_gap_nats(load_config(smallest, overrides)) == expected


@pytest.mark.parametrize("name", ["block-gate", "iw-opd", "lsm", "prune-opd"])
def test_a_published_experiment_states_its_rule_of_drift(name: str) -> None:
    """Defaults may move; an experiment may not move with them."""
    config = load_config(CONFIGS / f"trainer-{name}.toml")
    assert config.drift.model_fields_set == set(type(config.drift).model_fields)
    assert config.drift.w_drop == 0.01
    assert not config.drift.stop_in_flight
    assert "k" in config.teacher.model_fields_set
    if config.drift.metric == "overlap_ratio":
        assert (config.drift.k, config.drift.threshold) == (16, 0.7)
    else:
        assert (config.drift.k, config.drift.top_p) == (32, 0.95)


def test_the_playground_states_its_rule_of_drift() -> None:
    config = load_config(CONFIGS / "trainer-demo.toml")
    assert drift_policy(config) == DriftPolicy(
        metric=OverlapRatio(k=3, threshold=0.5), w_drop=0.25, stop_in_flight=True
    )
    assert (config.teacher.k, config.rollout.student_topk) == (8, 8)


def test_the_constants_of_a_metric_reach_its_record(smallest: Path) -> None:
    overrides = ["drift.metric=teacher_top_p_accept", "drift.k=4", "drift.top_p=0.5"]
    policy = drift_policy(load_config(smallest, [*overrides, "drift.w_drop=0.25"]))
    assert policy == DriftPolicy(metric=TeacherTopPAccept(k=4, top_p=0.5), w_drop=0.25)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_settings_of_its_constants(smallest: Path, name: str) -> None:
    section = load_config(smallest, [f"drift.metric={name}"]).drift
    shared = {"metric", "w_drop", "stop_in_flight"}
    constants = {field.name for field in fields(METRICS[name])}
    assert set(type(section).model_fields) == constants | shared


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ["drift.metric=teacher_top_p_accept", "drift.threshold=0.7"],
            r"drift\.threshold is read by metric overlap_ratio only; metric is teacher_top_p_acc",
        ),
        (
            ["drift.top_p=0.9"],
            r"drift\.top_p is read by metric teacher_top_p_accept only; metric is overlap_ratio",
        ),
        (["drift.metric=vibes"], r"'vibes', must be one of overlap_ratio, teacher_top_p_accept"),
        (["drift.metric=[1]"], r"drift"),
        (["drift=3"], r"drift"),
        (["drift.treshold=0.5"], r"drift\.treshold: unknown setting; did you mean 'threshold'"),
    ],
)
def test_a_setting_that_the_metric_does_not_read_is_refused(
    smallest: Path, overrides: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(smallest, overrides)


def test_settings_cannot_be_changed_after_loading(smallest: Path) -> None:
    config = load_config(smallest)
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 4  # type: ignore[misc]


def test_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.toml"
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such configuration file"):
        load_config(path)


def test_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[run\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.toml: not TOML"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "place", "nearest"),
    [
        ("rollout.temprature=1", "rollout.temprature", "temperature"),
        ("optim.learning_rte=1", "optim.learning_rte", "learning_rate"),
        ("optm.learning_rate=1", "optm", "optim"),
        ("budget.max_token=5", "budget.max_token", "max_tokens"),
        ("weights.block_gate.taw=5", "weights.block_gate.taw", "tau"),
        ("loss.clip_log_ration=5", "loss.clip_log_ration", "clip_log_ratio"),
    ],
)
def test_unknown_setting_is_refused_with_its_place_and_the_nearest_name(
    smallest: Path, override: str, place: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(smallest, [override])
    assert f"{place}: unknown setting; did you mean {nearest!r}?" in str(caught.value)


def test_missing_setting_is_named(smallest: Path) -> None:
    smallest.write_text(SMALLEST.replace("steps = 3", ""), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.steps: Field required"):
        load_config(smallest)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["teacher.k=7"], r"drift\.k is 8, more than the teacher\.k 7"),
        (["rollout.student_topk=7"], r"drift\.k is 8, more than the rollout\.student_topk 7"),
        (
            [*TOPK_LOSS, "rollout.student_topk=0"],
            r"needs rollout\.student_topk > 0",
        ),
        (
            [*TOPK_LOSS, "rollout.top_p=0.9"],
            r"needs the behavior policy's full distribution, but rollout\.top_p is 0\.9",
        ),
        (
            [*TOPK_LOSS, "loss.support=intersection", "rollout.top_p=0.9"],
            r"full distribution, but rollout\.top_p is 0\.9",
        ),
        (
            [*TOPK_LOSS, "loss.support=union", "rollout.student_topk=0"],
            r"sums over the student's top-k and needs rollout\.student_topk > 0, it is 0",
        ),
        (
            [*V2_LOSS, "rollout.student_topk=0"],
            r"local_support_matching sums over the student's top-k and needs rollout\.student_topk",
        ),
        ([*V2_LOSS, "rollout.top_p=0.9"], r"ids outside the nucleus are arbitrary"),
        (
            ["loss.tail=true", "loss.clip_log_ratio=5"],
            r"tail and clip_log_ratio exclude each other",
        ),
        (["loss.support=union"], r"loss\.support: .*teacher_topk"),
        ([*TOPK_LOSS, "loss.support=teacher_topk"], r"support: .*only_stu"),
        ([*TOPK_LOSS, "loss.weight_mode=none"], r"weight_mode: .*student_p"),
        ([*TOPK_LOSS, "loss.clip_epsilon=1"], r"clip_epsilon.*less than 1"),
        (["teacher.k=1", "drift.k=1"], r"is 0 on a single token: teacher\.k must be at least 2"),
        (
            ["loss.kind=entropy_aware_kl", "teacher.k=1", "drift.k=1"],
            r"entropy_aware_kl renormalises on the teacher's top-k and is 0 on a single token",
        ),
        (["loss.kind=generalized_jsd", "loss.beta=0"], r"loss\.beta: .*than 0"),
        (["loss.kind=generalized_jsd", "loss.beta=1"], r"loss\.beta: .*than 1"),
        (
            ["loss.kind=generalized_jsd", "loss.tail=true"],
            r"loss\.tail is read by kind local_support_matching, .* only; kind is generalized_jsd",
        ),
        (
            ["loss.kind=entropy_aware_kl", "loss.entropy_threshold=-1"],
            r"entropy_threshold: .*greater than or equal to 0",
        ),
        (["rollout.top_p=0.9"], r"overlap_ratio with rollout\.top_p 0\.9.*teacher_top_p_accept"),
        (["budget.max_tokens=200"], r"largest budget is 200 tokens.*rollout\.max_context 200"),
        (
            ['budget={"kind":"prune","initial":10,"minimum":10,"maximum":200}'],
            r"largest budget is 200 tokens",
        ),
        (
            ['budget={"kind":"prune","initial":5,"minimum":10,"maximum":20}'],
            r"minimum <= initial <= maximum, got 10, 5, 20",
        ),
        (
            [
                'budget={"kind":"progressive","initial":30,"maximum":20,"increment":1,"every_steps":1}'
            ],
            r"minimum <= initial <= maximum, got 1, 30, 20",
        ),
        (
            ['budget={"kind":"quantile","initial":5,"minimum":10,"maximum":20}'],
            r"minimum <= initial <= maximum, got 10, 5, 20",
        ),
        (
            [
                'budget={"kind":"progressive","initial":3,"maximum":200,"increment":1,"every_steps":1}'
            ],
            r"largest budget is 200 tokens",
        ),
        (
            ["data.heldout=h.jsonl", "eval.max_tokens=200"],
            r"eval\.max_tokens is 200.*rollout\.max_context 200",
        ),
        (
            ["loss.kind=cross_entropy"],
            r"loss\.kind is 'cross_entropy', must be one of sampled_reverse_kl, ",
        ),
        (
            ["loss.kind=sampled_reverse_kl", "weights.importance_ratio.mode=mask"],
            r"importance_ratio with loss sampled_reverse_kl: its surrogate already holds the",
        ),
        (
            [*TOPK_LOSS, "weights.importance_ratio.max_ratio=2"],
            r"importance_ratio with loss student_topk_reverse_kl: its surrogate already holds",
        ),
        (
            ["weights.position_window.start_share=0.5", "weights.position_window.end_share=0.5"],
            r"weights\.position_window: .*start_share is 0\.5 and must be below the end_share 0\.5",
        ),
        (["weights.prefix_importance.kind=causal"], r"causal needs tau_nats.*abs_advantage"),
        (
            ["weights.prefix_importance.tau_nats=4"],
            r"prefix_importance\.tau_nats is read by kind causal only; kind is cumulative",
        ),
        (
            ["weights.prefix_importance.kind=linear", "weights.prefix_importance.max_gap_nats=5"],
            r"max_gap_nats is read by kind .* and causal only; kind is linear",
        ),
        (
            ["weights.block_gate.min_span=4"],
            r"block_gate\.min_span is read by granularity newline only; granularity is block",
        ),
        (
            ["weights.block_gate.granularity=newline", "weights.block_gate.max_span=20"],
            r"max_span is 20 and must be at least twice the min_span 16",
        ),
        (["weights.block_gate.newline_tokens=[]"], r"newline_tokens: .*at least 1"),
        (
            ["weights.importance_ratio.min_ratio=0.5"],
            r"ratio\.min_ratio is read by mode mask only; mode is truncate",
        ),
        (["weights.entropy_top.ratio=0"], r"entropy_top\.ratio: .*greater than 0"),
        (
            ["run.queue_depth=1"],
            r"run\.queue_depth is now rollout\.max_staleness",
        ),
        (
            ['sampler={"kind":"hf_batched","weights_dir":"/tmp"}'],
            r"sampler\.weights_dir is read by kind vllm only; kind is hf_batched",
        ),
        (
            ["sampler.weight_transfer=ipc", "sampler.weights_dir=/tmp"],
            r'weight_transfer is "ipc", and sampler\.weights_dir names a folder: "host" for the',
        ),
        (
            ["sampler.weight_transfer=nccl", "student.lora.sync=adapter"],
            r'weight_transfer is "nccl", and the adapter .* as files: "host", or .* = "merged"',
        ),
        (
            ["sampler.sleep_level=2", "student.lora.sync=adapter"],
            r'sleep_level is 2, and the adapter\'s base is not sent again: 1, or .* = "merged"',
        ),
        (
            ["sampler.sleep_level=1", "rollout.max_staleness=1"],
            r"sleep_level is 1, and rollout\.max_staleness is 1: .*; sleep_level 0, or max_stal",
        ),
        (["sampler.sleep_level=3"], r"sleep_level: .*0, 1 or 2"),
        (
            [SHARED, "rollout.max_staleness=1"],
            r"sampler\.weights is 'shared', and rollout\.max_staleness is 1: .*'copied', or 'auto'",
        ),
        ([SHARED, "student.dtype=bfloat16"], r"student\.dtype is 'bfloat16'.*'copied'"),
        ([SHARED, "sampler.dtype=bfloat16"], r"sampler\.dtype is 'bfloat16'.*'copied'"),
        (["run.steps=0"], r"run\.steps: .*greater than 0 \(got 0\)"),
        (["rollout.temperature=0"], r"rollout\.temperature: .*\(got 0\)"),
        (["rollout.temperature=Infinity"], r"rollout\.temperature: .*finite.*\(got inf\)"),
        (["optim.learning_rate=NaN"], r"optim\.learning_rate: .*\(got nan\)"),
        (["optim.betas=3"], r"optim\.betas: Input should be a valid list"),
        (["optim.betas=[0.9,1.0]"], r"optim\.betas\.1: .*less than 1 \(got 1\.0\)"),
        (["teacher.endpoints=[]"], r"teacher\.endpoints: .*at least 1"),
        (
            ["drift.k=256", "teacher.k=256", "rollout.student_topk=256"],
            r"drift\.k: .*255 \(got 256\)",
        ),
        (["drift.threshold=1e-12"], r"drift\.threshold: .*0\.000000001 \(got 1e-12\)"),
        (["eval.answer_pattern=#("], r"eval\.answer_pattern: .*not a regular expression"),
        (["eval.answer_pattern=#[0-9]+"], r"eval\.answer_pattern: .*needs a group"),
        (["eval.pass_k=[2,0]"], r"eval\.pass_k\.1: .*greater than 0"),
        (["eval.pass_k=-1"], r"eval\.pass_k\.0: .*greater than 0"),
        (["eval.grader=sympy"], r"eval\.grader: .*'auto', 'exact' or 'math'"),
    ],
)
def test_combination_that_cannot_work_is_refused_with_its_reason(
    smallest: Path, overrides: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(smallest, overrides)


def test_drift_k_may_exceed_the_student_topk_when_nothing_compares_them(smallest: Path) -> None:
    overrides = ["drift.metric=teacher_top_p_accept", "rollout.student_topk=0"]
    assert load_config(smallest, overrides).drift.k == 64


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.support=teacher_topk_and_sampled", "rollout.student_topk=0"],
        ["loss.support=teacher_topk_and_sampled", "teacher.k=1", "drift.k=1"],
        ["loss.tail=true", "teacher.k=1", "drift.k=1"],
        ["loss.kind=forward_kl", "loss.tail=false", "rollout.student_topk=0"],
        ["loss.kind=generalized_jsd", "rollout.top_p=0.9"],
        ["loss.kind=entropy_aware_kl", "rollout.top_p=0.9"],
        [*TOPK_LOSS, "loss.support=only_tch", "rollout.student_topk=0"],
    ],
)
def test_loss_asks_for_no_more_than_it_needs(smallest: Path, overrides: list[str]) -> None:
    load_config(smallest, ["drift.metric=teacher_top_p_accept", *overrides])


def test_entropies_are_asked_of_the_teacher_by_the_loss_that_needs_them(smallest: Path) -> None:
    assert not score_options(load_config(smallest)).want_entropy
    assert score_options(load_config(smallest, ["loss.kind=entropy_aware_kl"])).want_entropy


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], LocalSupportMatching()),
        (
            ["loss.support=teacher_topk_and_sampled", "loss.tail=true"],
            LocalSupportMatching(support="teacher_topk_and_sampled", tail=True),
        ),
        (["loss.clip_log_ratio=5"], LocalSupportMatching(clip_log_ratio=5.0)),
        (["loss.kind=truncated_reverse_kl", "loss.tail=true"], TruncatedReverseKL(tail=True)),
        (["loss.kind=forward_kl"], ForwardKL()),
        (["loss.kind=generalized_jsd", "loss.beta=0.1"], GeneralizedJSD(beta=0.1)),
        (["loss.kind=entropy_aware_kl"], EntropyAwareKL(entropy_threshold=0.8, tail=False)),
        (["loss.kind=sampled_reverse_kl", "loss.dual_clip=null"], SampledReverseKL(dual_clip=None)),
        (
            [*TOPK_LOSS, "loss.support=union", "loss.weight_mode=teacher_p"],
            StudentTopKReverseKL(support="union", weight_mode="teacher_p"),
        ),
    ],
)
def test_settings_of_the_loss_become_the_divergence(
    smallest: Path, overrides: list[str], expected: Divergence
) -> None:
    assert divergence(load_config(smallest, overrides)) == expected


def test_override_replaces_a_value_and_makes_a_section(smallest: Path) -> None:
    overrides = ["run.steps=7", "student.model=other/name", "weights.prune.w_base=0.25"]
    config = load_config(smallest, [*overrides, 'special_tokens.tokens=["<"]'])
    assert config.run.steps == 7
    assert config.student.model == "other/name"
    assert config.weights.prune is not None
    assert config.weights.prune.w_base == 0.25
    assert config.weights.block_gate is None
    assert config.special_tokens.tokens == ("<",)


def test_later_override_wins(smallest: Path) -> None:
    assert load_config(smallest, ["run.steps=7", "run.steps=8"]).run.steps == 8


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("run.steps", "must look like section.key=value"),
        ("run.steps.more=1", "steps is a value, not a section"),
    ],
)
def test_malformed_override_is_refused(smallest: Path, override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(smallest, [override])


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], False),
        (["loss.kind=sampled_reverse_kl"], False),
        (["rollout.top_p=0.9"], False),
        (["rollout.top_p=0.9", "loss.kind=sampled_reverse_kl"], True),
        (["rollout.top_p=0.9", "weights.block_gate.tau=1"], True),
        (["rollout.top_p=0.9", "weights.prefix_importance.gamma=1"], True),
        (["rollout.top_p=0.9", "weights.importance_ratio.max_ratio=2"], True),
        (["rollout.top_p=0.9", "weights.prune.w_base=1"], False),
        ([*TOPK_LOSS], False),
        ([*TOPK_LOSS, "loss.support=intersection"], False),
        ([*TOPK_LOSS, "loss.support=only_tch"], True),
        ([*TOPK_LOSS, "loss.support=only_tch", "rollout.top_p=0.9"], True),
        ([*TOPK_LOSS, "loss.support=union"], True),
        ([*TOPK_LOSS, "loss.support=symmetric_difference"], True),
        (["loss.support=teacher_topk_and_sampled"], False),
    ],
)
def test_behavior_is_recomputed_only_where_the_samplers_will_not_do(
    smallest: Path, overrides: list[str], needed: bool
) -> None:
    config = load_config(smallest, ["drift.metric=teacher_top_p_accept", *overrides])
    assert config.needs_learner_behavior is needed


@pytest.mark.parametrize(
    ("given", "pass_k"), [("0", ()), ("4", (4,)), ("[1,8]", (1, 8)), ("[]", ())]
)
def test_pass_k_is_one_k_or_several(smallest: Path, given: str, pass_k: tuple[int, ...]) -> None:
    settings = load_config(smallest, [f"eval.pass_k={given}"]).eval
    assert settings.pass_k == pass_k
    assert settings.num_samples == max(pass_k, default=0)


@pytest.mark.parametrize(
    ("overrides", "mathematics"),
    [
        ([], True),
        (["eval.answer_pattern=#(.+)"], False),
        (["eval.answer_pattern=#(.+)", "eval.grader=math"], True),
        (["eval.grader=exact"], False),
    ],
)
def test_auto_compares_mathematics_in_boxes(
    smallest: Path, overrides: list[str], mathematics: bool
) -> None:
    assert load_config(smallest, overrides).eval.compares_mathematics is mathematics


@pytest.mark.parametrize(
    ("k", "student_topk", "teacher_k", "compared"), [(6, 4, 8, 4), (6, 8, 6, 6), (3, 4, 5, 3)]
)
def test_the_overlap_is_logged_over_what_was_compared(
    smallest: Path, k: int, student_topk: int, teacher_k: int, compared: int
) -> None:
    """k 6 and a list of 4: identical lists gave 0.667."""
    changes = [
        "drift.metric=teacher_top_p_accept",
        f"drift.k={k}",
        f"rollout.student_topk={student_topk}",
        f"teacher.k={teacher_k}",
    ]
    assert load_config(smallest, changes).overlap_k == compared
    assert load_config(smallest, [*changes, "rollout.top_p=0.9"]).overlap_k is None
