"""What is trained can be saved, is saved whole, and opens elsewhere.

vLLM opens such a folder in tests/trainer/rollouts/test_samplers.py.
Run: python -m pytest tests/trainer/test_saved_student.py
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from student_trainer.errors import CheckpointError
from student_trainer.learner.learner import Learner
from student_trainer.saved_student import check_saveable, save_or_rescue, save_student
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import character_tokenizer, tiny_student
from tests.trainer.test_failures import files_of_at_most
from tests.trainer.test_train import (
    InMemoryClient,
    client,
    configured,
    folder,
    records,
    run_through,
)

__all__ = ["client", "folder"]
TEMPLATE = "{% for m in messages %}{{ m.content }};{% endfor %}"


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_student_opens_in_plain_transformers(tmp_path: Path, tied: bool) -> None:
    model, tokenizer = tiny_student(tied=tied).eval(), character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    save_student(model, tokenizer, tmp_path, stop_ids=(7, 1))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, model(ids).logits)
    assert opened.dtype == torch.float32
    assert opened.generation_config.eos_token_id == [1, 7]
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert other.get_vocab() == tokenizer.get_vocab()
    messages = [{"role": "user", "content": "1+1"}]
    assert other.apply_chat_template(messages, tokenize=False) == "1+1;"
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied


@pytest.mark.parametrize("present", [None, 1, [1, 2]])
def test_the_ids_that_end_a_response_are_listed_once_each(
    tmp_path: Path, present: int | list[int] | None
) -> None:
    model = tiny_student()
    model.generation_config.eos_token_id = present
    for _ in range(2):
        save_student(model, character_tokenizer(), tmp_path, stop_ids=(2, 9))
    expected = [*([] if present is None else [1]), 2, 9]
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["eos_token_id"] == expected
    model.generation_config.eos_token_id = None
    save_student(model, character_tokenizer(), tmp_path)
    assert "eos_token_id" not in json.loads((tmp_path / "generation_config.json").read_text())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_files_of_a_student_may_be_read_by_whom_the_umask_lets(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "student").mkdir()
        save_student(tiny_student(), character_tokenizer(), tmp_path / "student")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "student").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {mode}


INVALID = {
    "a temperature without do_sample": ({"temperature": 0.6, "top_p": 0.95}, "do_sample is set"),
    "a padding that is none": ({"pad_token_id": -1}, "all of it but the token ids is dropped"),
    "beams that are none": ({"length_penalty": 2.0, "temperature": 0.6}, "but the token ids"),
}


@pytest.mark.parametrize("name", INVALID)
def test_a_generation_config_that_could_not_be_saved_is_mended_with_one_sentence(
    tmp_path: Path, name: str
) -> None:
    values, how = INVALID[name]
    model = tiny_student()
    model.generation_config = GenerationConfig(eos_token_id=1, **values)
    with pytest.raises(ValueError, match="invalid"):
        model.generation_config.save_pretrained(tmp_path)
    said = check_saveable(model, character_tokenizer(), "student")
    assert said is not None
    assert how in said
    assert "\n" not in said
    save_student(model, character_tokenizer(), tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 1
    assert check_saveable(model, character_tokenizer(), "student") is None


def test_a_student_that_cannot_be_saved_is_refused_before_it_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = tiny_student(), character_tokenizer()

    def refuses(_: object) -> None:
        raise TypeError("not serialisable")

    monkeypatch.setattr(type(model.config), "save_pretrained", refuses)
    with pytest.raises(CheckpointError, match=r"could be trained but not saved: .*"):
        check_saveable(model, tokenizer, "student")


@pytest.mark.parametrize("lora", [[], ['student.lora={"rank":4}']], ids=["whole", "adapter"])
def test_a_quantised_student_is_refused_before_it_is_loaded(
    folder: Path, client: InMemoryClient, lora: list[str]
) -> None:
    path = folder / "student" / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantised))
    with pytest.raises(CheckpointError, match=r"weights are quantised \(bitsandbytes\).* adapter"):
        run_through(configured(folder, *lora))
    assert client.sessions == []


def test_a_run_of_such_a_student_says_so_once_and_saves_it(
    folder: Path, client: InMemoryClient, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "student" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6}))
    config = configured(folder, "run.steps=1", "checkpoint.every_steps=1")
    run_through(config)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("generation config could not be saved") == 1
    written = json.loads((config.run.out / "student" / "generation_config.json").read_text())
    assert (written["temperature"], written["do_sample"]) == (0.6, True)
    assert len(records(config, "step")) == 1


@contextmanager
def failing_to_save(error: Exception) -> Iterator[None]:
    """transformers refuses to save any model."""
    with pytest.MonkeyPatch.context() as patch:

        def refuses(*_: object, **__: object) -> None:
            raise error

        patch.setattr(PreTrainedModel, "save_pretrained", refuses)
        yield


def test_a_student_that_turns_out_unsaveable_leaves_its_weights_and_says_where(
    folder: Path, client: InMemoryClient
) -> None:
    config = configured(folder, "run.steps=1", "checkpoint.every_steps=null")
    with (
        failing_to_save(ValueError("shared\ntensors")),
        pytest.raises(CheckpointError) as caught,
    ):
        run_through(config)
    weights = config.run.out / "student-weights"
    assert str(caught.value) == (
        f"the trained student could not be saved, its weights are in {weights}: shared tensors"
    )
    opened = AutoModelForCausalLM.from_pretrained(weights)
    assert opened.config.vocab_size == tiny_student().config.vocab_size
    trained = load_file(weights / "model.safetensors")
    assert not torch.equal(trained["lm_head.weight"], tiny_student().lm_head.weight)
    assert AutoTokenizer.from_pretrained(weights).get_vocab() == character_tokenizer().get_vocab()
    assert not list(config.run.out.glob(".student*"))
    assert json.loads((config.run.out / "summary.json").read_text())["finished"] is False


def saved(learner: Learner, final: Path) -> None:
    save_or_rescue(final, learner.save, learner.save_what_can_be)


def test_an_earlier_student_stays_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    learner = learner_of(tiny_student())
    saved(learner, tmp_path / "student")
    before = {p.name: p.read_bytes() for p in (tmp_path / "student").iterdir()}
    with files_of_at_most(10_000), pytest.raises(CheckpointError, match="nor could its bare") as e:
        saved(learner, tmp_path / "student")
    assert "\n" not in str(e.value)
    assert {p.name: p.read_bytes() for p in (tmp_path / "student").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
