"""What is said of a setting that is not read, misspelt or renamed, in any group and any union."""

from __future__ import annotations

from pathlib import Path

import pytest

from student_trainer.errors import ConfigError
from student_trainer.settings import problems
from student_trainer.settings.config import TrainerConfig, load_config
from student_trainer.settings.sampler import VllmSamplerSettings
from student_trainer.settings.section import alternatives, groups, is_by_name
from tests.trainer.settings.smallest_config import SMALLEST


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "trainer.toml"
    path.write_text(SMALLEST, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    """Everything that is wrong, without the first line, which names the file."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return "\n".join(line.strip() for line in str(caught.value).splitlines()[1:])


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["budget.patience=3"], "budget.patience is read by kind prune only; kind is fixed"),
        (
            ["budget.margin=3"],
            "budget.margin is read by kind prune and quantile only; kind is fixed",
        ),
        (
            ["loss.beta=0.5"],
            "loss.beta is read by kind generalized_jsd only; kind is local_support_matching",
        ),
        (
            ["sampler.kind=hf", "sampler.max_num_seqs=3"],
            "sampler.max_num_seqs is read by kind vllm and hf_batched only; kind is hf",
        ),
        (
            ["weights.prefix_importance.alpha=0.5"],
            "weights.prefix_importance.alpha is read by kind ideal_ratio and ideal_blend only; "
            "kind is cumulative",
        ),
        (
            ["weights.block_gate.granularity=token", "weights.block_gate.block_size=8"],
            "weights.block_gate.block_size is read by granularity block and newline only; "
            "granularity is token",
        ),
    ],
)
def test_a_setting_that_the_kind_does_not_read_is_refused_with_the_kinds_that_do(
    smallest: Path, overrides: list[str], reason: str
) -> None:
    assert refusal(smallest, *overrides) == reason


def test_every_kind_of_every_union_refuses_what_only_another_reads(smallest: Path) -> None:
    num_pairs = 0
    for name, field in TrainerConfig.model_fields.items():
        for kind, group in alternatives(field).items():
            for other, its_group in alternatives(field).items():
                for key in sorted(its_group.model_fields.keys() - group.model_fields.keys()):
                    said = refusal(
                        smallest, f'{name}={{"{field.discriminator}":"{kind}","{key}":1}}'
                    )
                    assert f"{name}.{key} is read by " in said
                    assert other in said
                    assert said.endswith(f"only; {field.discriminator} is {kind}") or "\n" in said
                    num_pairs += 1
    assert num_pairs > 50


@pytest.mark.parametrize("kind", ["", "sampler.kind=hf"])
def test_what_the_sampler_reads_is_taken(smallest: Path, kind: str) -> None:
    config = load_config(smallest, [*([kind] if kind else []), "sampler.dtype=float32"])
    assert config.sampler.dtype == "float32"
    assert isinstance(config.sampler, VllmSamplerSettings) is not bool(kind)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (
            "budget.patiense=3",
            "budget.patiense: unknown setting; did you mean 'patience'? It is read by kind prune "
            "only; kind is fixed",
        ),
        ("budget.max_token=3", "budget.max_token: unknown setting; did you mean 'max_tokens'?"),
        ("rollout.steps=3", "rollout.steps: unknown setting; did you mean 'run.steps'?"),
        (
            "optim.top_p=1",
            "optim.top_p: unknown setting; did you mean 'drift.top_p' or 'rollout.top_p'?",
        ),
        ("run.kind=3", "run.kind: unknown setting"),
        ("zzz=3", "zzz: unknown setting"),
        ("sampler.kind=hff", "sampler.kind is 'hff', must be one of vllm, hf, hf_batched"),
        ("sampler=3", "sampler is 3, must be a table of settings"),
        ("weights.prune=true", "weights.prune is True, must be a table of settings"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_one_that_was_meant(
    smallest: Path, override: str, reason: str
) -> None:
    assert refusal(smallest, override) == reason


def test_no_suggestion_is_the_word_that_was_typed(smallest: Path) -> None:
    """Every name of every group, typed into every other group."""
    leaves: set[str] = set()
    sections: dict[str, set[str]] = {}
    for name, field in TrainerConfig.model_fields.items():
        held = [] if is_by_name(field) else groups(field.annotation)
        known: set[str] = set().union(*(group.model_fields for group in held))
        sections[name] = known
        leaves |= known
    for name, known in sections.items():
        for leaf in sorted(leaves - known):
            assert f"did you mean {leaf!r}" not in refusal(smallest, f"{name}.{leaf}=1")


def test_an_old_value_is_refused_with_the_one_that_took_its_place(smallest: Path) -> None:
    said = refusal(smallest, "teacher.on_absent=drop")
    assert said == "teacher.on_absent: 'drop' is now 'finish_unscored'"


def test_an_old_name_is_refused_with_the_one_that_took_its_place(
    smallest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(problems.RENAMED, "budget.length", "budget.max_tokens")
    assert refusal(smallest, "budget.length=3") == "budget.length is now budget.max_tokens"


def test_renamed_settings_are_gone_and_their_heirs_are_there() -> None:
    names = problems.names(TrainerConfig)
    known = set().union(*names.values())
    assert [name for name in problems.RENAMED if name in known] == []
    assert [name for name in problems.RENAMED.values() if name not in known] == []
    assert [name for name, _ in problems.RENAMED_VALUES if name not in known] == []


@pytest.mark.parametrize(
    "endpoint", ["teacher", "http://teacher:1", "teacher:0", "teacher:65536", "::1:5"]
)
def test_an_endpoint_is_a_host_and_a_port(smallest: Path, endpoint: str) -> None:
    said = refusal(smallest, f'teacher.endpoints=["127.0.0.1:1", "{endpoint}"]')
    assert said.startswith(f"teacher.endpoints: {endpoint!r} must be host:port")
    load_config(smallest, ['teacher.endpoints=["[::1]:5", "teacher.example:65535"]'])
