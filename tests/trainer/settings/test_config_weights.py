"""Weights from settings, and what is warned about."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest

from student_trainer.assembly import from_settings, methods
from student_trainer.cli import main
from student_trainer.errors import ConfigError
from student_trainer.losses.weight_choice import (
    BlockGate,
    EntropyTop,
    ImportanceRatio,
    PositionWindow,
    PrefixImportanceWeight,
    PruneWeight,
)
from student_trainer.settings.config import TrainerConfig, load_config
from student_trainer.settings.loss import (
    EntropyAwareKLSettings,
    LossSettings,
    ResidualReverseKLSettings,
    SampledReverseKLSettings,
    StudentTopKReverseKLSettings,
    SuppressUnlikelySettings,
)
from student_trainer.settings.warnings import warnings
from tests.trainer.learner.tiny_student import character_tokenizer
from tests.trainer.settings.smallest_config import SMALLEST

RATIO_LOSSES = (
    SampledReverseKLSettings,
    StudentTopKReverseKLSettings,
    ResidualReverseKLSettings,
    SuppressUnlikelySettings,
)
CONFIGS = Path(__file__).parents[3] / "configs"
GATE = "weights.block_gate.tau=1"
RATIO = "weights.importance_ratio.mode=mask"
PRUNE = "weights.prune.w_base=0.5"
NUCLEUS = ["rollout.top_p=0.9", "drift.metric=teacher_top_p_accept"]
RATED = ["data.heldout=h", "eval.max_tokens=9", "checkpoint.keep_best=1"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "trainer.toml"
    path.write_text(SMALLEST, encoding="utf-8")
    return path


def configured(path: Path, *overrides: str) -> TrainerConfig:
    return load_config(path, overrides)


def test_every_table_makes_its_weight_with_every_setting(path: Path) -> None:
    config = configured(
        path,
        "drift.w_drop=0.05",
        'weights.prune={"w_base":0.25,"normalize":true}',
        'weights.prefix_importance={"kind":"causal","gamma":0.7,"tau_nats":9,"max_gap_nats":5,'
        '"normalize":"batch_mean"}',
        'weights.position_window={"start_share":0.1,"end_share":0.4}',
        "weights.entropy_top.ratio=0.4",
        'weights.block_gate={"granularity":"newline","block_size":8,"tau":2,"aggregate":"rms",'
        '"min_span":3,"max_span":9}',
        'weights.importance_ratio={"mode":"mask","granularity":"sequence","min_ratio":0.5,'
        '"max_ratio":3}',
    )
    assert methods.weights(config, newline_ids=(7,)) == [
        PruneWeight(w_drop=0.05, w_base=0.25, normalize=True),
        PrefixImportanceWeight(
            kind="causal", gamma=0.7, tau_nats=9, max_gap_nats=5, normalize="batch_mean"
        ),
        PositionWindow(start_share=0.1, end_share=0.4),
        EntropyTop(ratio=0.4),
        BlockGate(
            granularity="newline",
            block_size=8,
            tau=2,
            aggregate="rms",
            newline_ids=(7,),
            min_span=3,
            max_span=9,
        ),
        ImportanceRatio(mode="mask", granularity="sequence", min_ratio=0.5, max_ratio=3),
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (PRUNE, PruneWeight(w_drop=3 / 100)),
        ("weights.prefix_importance.gamma=0.5", PrefixImportanceWeight()),
        (
            'weights.prefix_importance={"kind":"fixed_prefix","prefix_share":0.2}',
            PrefixImportanceWeight(kind="fixed_prefix", prefix_share=0.2),
        ),
        (
            'weights.prefix_importance={"kind":"ideal_ratio","alpha":0.001}',
            PrefixImportanceWeight(kind="ideal_ratio", alpha=0.001),
        ),
        ("weights.position_window.end_share=0.3", PositionWindow(start_share=0.0, end_share=0.3)),
        ("weights.entropy_top={}", EntropyTop()),
        (GATE, BlockGate()),
        ("weights.importance_ratio={}", ImportanceRatio()),
    ],
)
def test_defaults_of_settings_are_those_of_the_weights(
    path: Path, override: str, expected: object
) -> None:
    assert methods.weights(configured(path, override)) == [expected]


def test_losses_that_clip_a_policy_ratio_are_those_that_hold_one() -> None:
    alternatives = typing.get_args(typing.get_args(LossSettings)[0])
    clipping = {
        typing.get_args(section.model_fields["kind"].annotation)[0]
        for section in alternatives
        if "dual_clip" in section.model_fields
    }
    assert clipping == {section().kind for section in RATIO_LOSSES} | {"entropy_aware_kl"}
    assert all(section().has_a_ratio for section in RATIO_LOSSES)
    assert EntropyAwareKLSettings(reverse="sampled").has_a_ratio
    assert not EntropyAwareKLSettings().has_a_ratio


def test_newlines_are_the_tokens_whose_text_holds_one(path: Path) -> None:
    tokenizer = character_tokenizer()
    newline = tokenizer.get_vocab()["\n"]
    spans = "weights.block_gate.granularity=newline"
    assert from_settings.newline_ids(configured(path), tokenizer) == ()
    assert from_settings.newline_ids(configured(path, GATE), tokenizer) == ()
    assert from_settings.newline_ids(configured(path, spans), tokenizer) == (newline,)
    named = configured(path, spans, 'weights.block_gate.newline_tokens=[";", "\\n"]')
    found = from_settings.newline_ids(named, tokenizer)
    assert found == (tokenizer.get_vocab()[";"], newline)
    unknown = configured(path, spans, 'weights.block_gate.newline_tokens=["<br>"]')
    with pytest.raises(ConfigError, match="'<br>' is not in the vocabulary"):
        from_settings.newline_ids(unknown, tokenizer)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], []),
        ([GATE], ["block_gate: one update a batch"]),
        ([RATIO], ["importance_ratio: one update a batch"]),
        ([GATE, RATIO], ["block_gate: one update a batch", "importance_ratio: one update"]),
        ([GATE, "optim.epochs=2"], []),
        ([GATE, "optim.updates_per_epoch=2"], []),
        ([RATIO, "rollout.max_staleness=1"], []),
        (
            [*NUCLEUS, RATIO, "rollout.max_staleness=1"],
            ["within the batch only: so with one update"],
        ),
        (
            [*NUCLEUS, RATIO, "rollout.max_staleness=1", "optim.epochs=2"],
            ["within the batch only: not the rollouts' age"],
        ),
        ([*NUCLEUS, RATIO, "optim.epochs=2"], []),
        ([PRUNE], []),
        ([PRUNE, "weights.prefix_importance.gamma=0.5"], ["prefix_importance are redundant"]),
        (["weights.prune.w_base=0"], []),
        (["weights.prune.w_base=0", "drift.stop_in_flight=false"], ["count nothing"]),
        (["weights.entropy_top.ratio=0.2", "weights.position_window.end_share=0.3"], []),
        (
            ["eval.pass_k=2", "eval.max_tokens=9", "data.answer_field=x"],
            ["eval.max_tokens, eval.pass_k, data.answer_field: without data.heldout nothing"],
        ),
        (["teacher.logprob_dtype=f16"], []),
        (["teacher.logprob_dtype=f16", "loss.tail=true"], ["outside its top-k is right to 2e-4"]),
        (["teacher.logprob_dtype=f16", "loss.kind=forward_kl"], []),
        (["loss.tail=true"], []),
        (["data.heldout=h", "eval.max_tokens=9", "eval.temperature=2"], []),
        (
            ["data.heldout=h", "eval.max_tokens=9", "eval.pass_k=0", "eval.temperature=2"],
            ["eval.temperature: it is that of pass@k, and eval.pass_k is 0"],
        ),
        (
            ["rollout.student_topk=16", "drift.k=16", "drift.threshold=0.99"],
            ["one differing entry of 16 is a bad event. A model against itself in bfloat16 has"],
        ),
        (["rollout.student_topk=16", "drift.k=16", "drift.threshold=0.93"], []),
        (["drift.k=4", "drift.threshold=1"], []),
        (["special_tokens.occurrences=all"], ["special_tokens: without special_tokens.tokens"]),
        (["checkpoint.keep=5"], []),
        (
            ["checkpoint.keep=5", "checkpoint.every_minutes=null"],
            ["checkpoint.keep: without checkpoint.every_steps and checkpoint.every_minutes"],
        ),
        (
            ["checkpoint.every_minutes=5", "checkpoint.every_steps=3"],
            ["checkpoint.every_minutes: checkpoint.every_steps is 3, and it alone counts"],
        ),
        (
            [*NUCLEUS, "rollout.student_topk=4"],
            ["rollout.student_topk is 4: with rollout.top_p"],
        ),
        (["checkpoint.keep=5", "checkpoint.every_steps=3"], []),
        (["checkpoint.every_steps=4"], ["checkpoint.every_steps is 4 and run.steps 3"]),
        (["checkpoint.best_metric=accuracy"], ["without checkpoint.keep_best no checkpoint is"]),
        (
            ["data.heldout=h", "eval.max_tokens=9", "checkpoint.keep_best=1"],
            ["checkpoints come by the clock and evaluations every 10 steps"],
        ),
        (
            [*RATED, "checkpoint.every_steps=3", "eval.every_steps=2"],
            ["checkpoints come every 3 steps and evaluations every 2 steps"],
        ),
        ([*RATED, "checkpoint.every_steps=2", "eval.every_steps=1"], []),
        (
            [*RATED, "checkpoint.every_steps=1", "checkpoint.best_metric=pass_at_4"],
            ["checkpoint.best_metric pass_at_4: it is in the first and the last evaluation alone"],
        ),
        (["optim.warmup_steps=2"], []),
        (["optim.warmup_steps=3"], ["the learning rate only rises"]),
    ],
)
def test_warnings_name_what_will_surprise(
    path: Path, overrides: list[str], expected: list[str]
) -> None:
    found = warnings(configured(path, *overrides))
    assert len(found) == len(expected)
    for warning, part in zip(found, expected, strict=True):
        assert part in warning


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("trainer-*.toml")), ids=lambda p: p.name)
def test_published_configuration_has_no_surprise(config: Path) -> None:
    assert warnings(load_config(config)) == []


def test_training_says_its_warnings_before_anything_else(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = f"student.model={path.parent}"
    assert main(["train", "--config", str(path), "--set", GATE, "--set", nothing]) == 2
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: weights.block_gate: one update a batch")
    assert second.startswith("CheckpointError: ")
