"""Every file in configs/ loads, fits its teacher, and has data that is here or described.

So do the two commands that README.md prints. Run: pytest tests/test_configs.py
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from student_trainer import cli as trainer_cli
from student_trainer.assembly.teachers import check_limits
from student_trainer.data import load_prompts
from student_trainer.settings.config import TrainerConfig, load_config
from student_trainer.settings.warnings import warnings
from teacher_server import cli as teacher_cli
from teacher_server.settings import TeacherConfig
from teacher_server.settings import load_config as load_teacher_config
from teacher_wire.records import TeacherInfo
from tests.trainer.data.made_tokenizers import byte_level

ROOT = Path(__file__).resolve().parent.parent
TRAINERS = sorted((ROOT / "configs").glob("trainer-*.toml"))
TEACHERS = sorted((ROOT / "configs").glob("teacher-*.toml"))
TEACHER_OF = {
    "trainer-demo.toml": "teacher-demo.toml",
    "trainer-language.toml": "teacher-language.toml",
}
"""Which teacher a trainer was written for, where it is not that of the papers' experiments."""
DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def teacher_config(*arguments: str) -> TeacherConfig:
    """As `teacher-server serve` reads it, with nothing in the environment."""
    flags = vars(teacher_cli.build_parser().parse_args(["serve", *arguments]))
    config, _ = load_teacher_config(flags, {})
    return config


def served(config: TeacherConfig) -> TeacherInfo:
    """The limits that such a teacher tells its clients."""
    return TeacherInfo(
        model_id=config.model,
        revision="",
        weights_digest="",
        dtype=config.dtype,
        vocab_size=151_936,
        tokenizer_fingerprint="",
        special_token_ids=(),
        max_k=config.max_k,
        max_context=config.max_context,
        engine=config.engine,
        engine_version="",
        instance_id="",
        max_sessions=config.max_sessions,
        max_append_tokens=config.max_append_tokens,
    )


def printed_commands() -> dict[str, list[str]]:
    """The two commands of README.md: program -> arguments."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Two commands of your own\n")[1].split("\n## ")[0]
    lines = re.findall(r"^    ((?:teacher-server|student-trainer) .*)$", section, re.MULTILINE)
    found = {words[0]: words[1:] for words in map(shlex.split, lines)}
    assert found.keys() == {"teacher-server", "student-trainer"}
    return found


def test_every_configuration_is_a_trainers_or_a_teachers() -> None:
    assert sorted((ROOT / "configs").iterdir()) == [*TEACHERS, *TRAINERS]
    assert len(TRAINERS) >= 6
    assert len(TEACHERS) >= 2


@pytest.mark.parametrize("path", TEACHERS, ids=lambda path: path.name)
def test_a_teachers_configuration_loads(path: Path) -> None:
    assert teacher_config("--config", str(path)).model


@pytest.mark.parametrize("path", TRAINERS, ids=lambda path: path.name)
def test_a_trainers_configuration_loads_fits_its_teacher_and_warns_of_nothing(path: Path) -> None:
    config = load_config(path)
    teacher = ROOT / "configs" / TEACHER_OF.get(path.name, "teacher-qwen3-4b.toml")
    check_limits(config, served(teacher_config("--config", str(teacher))))
    assert warnings(config) == []


@pytest.mark.parametrize("path", TRAINERS, ids=lambda path: path.name)
def test_the_data_of_a_configuration_is_here_or_described(path: Path) -> None:
    data = load_config(path).data
    for name in (data.train, data.heldout):
        if name is None:
            continue
        assert f"`configs/{path.name}`" in DATA or f"`{path.name}`" in DATA
        assert re.search(rf"^## .*{re.escape(name.name)}", DATA, re.MULTILINE)
        if not (ROOT / name).is_file() and name.parts[0] != "runs":
            assert f'open("{name}", "w", encoding="utf-8")' in DATA


def test_the_readmes_two_commands_fit_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = printed_commands()
    command, *arguments = commands["teacher-server"]
    assert command == "serve"
    teacher = teacher_config(*arguments)
    parsed = trainer_cli._parser().parse_args(commands["student-trainer"])
    trainer = load_config(parsed.config, parsed.set)
    check_limits(trainer, served(teacher))
    assert trainer.teacher.endpoints == (f"127.0.0.1:{teacher.grpc_port}",)
    assert teacher.gpu_memory_utilization + memory_share(trainer) < 0.7  # the learner's is the rest
    assert f"`{trainer.data.train}`" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("trainer", "teacher"), TEACHER_OF.items())
def test_a_demos_two_engines_may_start_at_once_on_one_gpu(trainer: str, teacher: str) -> None:
    """Each finds its share of the memory free, or does not start."""
    beside = teacher_config("--config", str(ROOT / "configs" / teacher)).gpu_memory_utilization
    assert beside + memory_share(load_config(ROOT / "configs" / trainer)) < 0.9


def memory_share(config: TrainerConfig) -> float:
    share: float = config.sampler.gpu_memory_utilization
    return share


class Rows(list[dict[str, Any]]):
    """A dataset of the hub, of a few rows as its card describes them."""

    def select_columns(self, names: list[str]) -> Rows:
        return Rows({name: row[name] for name in names} for row in self)


def dapo(index: int, text: str) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": text}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"9a9b6eb4-{index}"},
    }


HUB = {
    "BytedTsinghua-SIA/DAPO-Math-17k": Rows([dapo(0, "1+1"), dapo(1, "1+2"), dapo(0, "1+1")]),
    "zwhe99/DeepMath-103K": Rows(
        {"question": q, "final_answer": "3", "difficulty": d, "topic": "t", "r1_solution_1": "x"}
        for q, d in (("1+1", 5.5), ("1+2", 6.0), ("2*2", 8.5))
    ),
}


def recipes() -> Iterator[tuple[str, str]]:
    """The programs of docs/data.md, by the file that each writes."""
    for program in re.findall(r"```python\n(.*?)```", DATA, re.DOTALL):
        (name,) = re.findall(r'open\("([^"]+)", "w"', program)
        yield name, program


@pytest.mark.parametrize(("name", "program"), list(recipes()), ids=lambda value: value[:30])
def test_a_recipe_writes_what_a_run_reads(
    name: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On rows as the hub's data cards describe them: the hub itself is out of a test's reach."""
    hub = types.ModuleType("datasets")
    hub.load_dataset = lambda which, split: HUB[which]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/data.md", "exec"), {})
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    prompts = load_prompts(tmp_path / name, tokenizer, max_prompt_tokens=200)
    assert len(prompts) == 2
    assert all(prompt.answer for prompt in prompts)
    lines = (tmp_path / name).read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["messages"] for line in lines)
