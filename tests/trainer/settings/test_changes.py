"""What a resumed run may change is said where the setting is defined.

Run: python -m pytest tests/trainer/settings/test_changes.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from student_trainer.settings.changes import changes, determining, leaves, written
from student_trainer.settings.config import TrainerConfig, load_config
from student_trainer.settings.section import resolved
from tests.trainer.settings.smallest_config import SMALLEST

HARMLESS = """
checkpoint.best_metric checkpoint.every_minutes checkpoint.every_steps checkpoint.keep
checkpoint.keep_best eval.every_steps eval.texts metrics.host metrics.port optim.max_sync_gap_nats
optim.micro_batch_tokens
recording.max_bytes recording.rollouts_per_step run.otlp_endpoint run.out run.steps run.texts
sampler.cpu_cores sampler.enforce_eager sampler.gpus
sampler.gpu_memory_utilization sampler.kv_cache_gib sampler.max_num_seqs sampler.sleep_level
sampler.stream_interval sampler.tensor_parallel_size sampler.weight_transfer sampler.weights_dir
student.device student.gradient_checkpointing
teacher.connect_timeout_s teacher.endpoints teacher.max_replica_gap_nats teacher.tls_ca
teacher.tls_cert teacher.tls_key
teacher.token_file trackers.entity trackers.name trackers.project trackers.report_to
"""
"""A decision: with any of these changed a run learns what it would have learnt."""


def configured(folder: Path, *overrides: str) -> TrainerConfig:
    path = folder / "trainer.toml"
    path.write_text(SMALLEST)
    return load_config(path, overrides)


def test_these_settings_and_no_others_may_change(tmp_path: Path) -> None:
    marked = {leaf.name for leaf in leaves(configured(tmp_path)) if leaf.mark is not None}
    assert marked == set(HARMLESS.split())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.betas=[0.8,0.9]", "optim.betas [0.9, 0.95] -> [0.8, 0.9] no"),
        ("data.train=other.jsonl", 'data.train "train.jsonl" -> "other.jsonl" no'),
        ("student.device=cpu", 'student.device "auto" -> "cpu" yes'),
        ("checkpoint.every_steps=3", "checkpoint.every_steps null -> 3 yes"),
        ("run.steps=4", "run.steps 3 -> 4 yes"),
        ("run.steps=2", "run.steps 3 -> 2 no"),
        ("weights.prune.w_base=0.5", "weights.prune null -> unset no"),
    ],
)
def test_a_change_is_told_with_both_values_and_whether_it_is_harmless(
    tmp_path: Path, override: str, expected: str
) -> None:
    before = written(configured(tmp_path))
    found = [
        f"{change} {'yes' if change.harmless else 'no'}"
        for change in changes(before, configured(tmp_path, override))
    ]
    assert expected in found
    assert changes(before, configured(tmp_path)) == []


def test_a_setting_of_a_later_version_had_its_default_before(tmp_path: Path) -> None:
    before = written(configured(tmp_path))
    del before["optim.weight_decay"], before["run.seed"]
    (change,) = changes(before, configured(tmp_path, "run.seed=3"))
    assert str(change) == "run.seed unset -> 3"
    before["optim.momentum"] = "0.5"
    assert str(changes(before, configured(tmp_path))[0]) == "optim.momentum 0.5 -> unset"


def test_a_key_names_a_setting_or_a_group_and_no_other_that_begins_alike(tmp_path: Path) -> None:
    before = written(configured(tmp_path))
    (change,) = changes(before, configured(tmp_path, "optim.warmup_steps=1"))
    assert change.is_within(["optim"])
    assert change.is_within(["data", "optim.warmup_steps"])
    assert not change.is_within(["opt", "optim.warmup", "optim.learning_rate"])


def test_what_determines_a_run_is_what_may_not_change_and_its_length(tmp_path: Path) -> None:
    named = determining(configured(tmp_path))
    assert {"optim.learning_rate", "run.seed", "run.steps", "loss.kind", "data.train"} <= set(named)
    assert not {"run.out", "teacher.endpoints", "checkpoint.keep"} & set(named)
    assert named["optim.betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ['weights.block_gate={"granularity":"token"}', "sampler.kind=hf"],
        ['loss={"kind":"import","path":"a.b:c","options":{"x":[1]}}'],
        ['budget={"kind":"prune","initial":10,"minimum":5,"maximum":10}'],
    ],
)
def test_settings_that_were_written_in_full_are_read_as_the_same(
    tmp_path: Path, overrides: list[str]
) -> None:
    config = configured(tmp_path, *overrides)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(resolved(config)))
    assert load_config(path) == config
