"""A tokenizer gives the ids of its file, on both sides, whatever class the checkpoint names.

Run: python -m pytest tests/trainer/data/test_tokenizer_file.py
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from student_trainer import pretrained
from student_trainer.errors import CheckpointError
from student_trainer.pretrained import load_tokenizer
from teacher_server.process.loading import load_tokenizer as load_teacher_tokenizer
from teacher_server.settings import TeacherConfig
from teacher_wire.fingerprint import tokenizer_fingerprint
from teacher_wire.tokenizer_file import PROBES, faithful, first_difference
from tests.trainer.data.made_tokenizers import byte_level, write_byte_level


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer"])
def test_a_class_that_loses_spaces_is_not_used(
    tmp_path: Path, name: str, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_byte_level(tmp_path / "model", tokenizer_class=name, model_type=model_type)
    as_named = AutoTokenizer.from_pretrained(folder)
    assert " " not in as_named.decode(as_named(PROBES[0])["input_ids"]), "or transformers mends it"
    served = load_teacher_tokenizer(TeacherConfig(engine="hf", model=str(folder)))
    caplog.clear()
    tokenizer = load_tokenizer(str(folder))
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert "loaded without that class" in said.getMessage()
    assert "LlamaTokenizer" in said.getMessage()
    truth = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in PROBES:
        expected = truth.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
        assert served(text, add_special_tokens=False)["input_ids"] == expected
        assert tokenizer.decode(expected) == text
    assert tokenizer.eos_token_id == 1
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(served)
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert first_difference(saved, folder / "tokenizer.json") is None


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_a_class_that_is_right_stays(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_byte_level(tmp_path / "model", tokenizer_class=name, model_type="qwen3")
    tokenizer = load_tokenizer(str(folder))
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(folder))
    assert caplog.records == []


def test_nothing_that_is_right_is_refused_with_a_text_and_both_ids(tmp_path: Path) -> None:
    folder = write_byte_level(
        tmp_path / "model", tokenizer_class="LlamaTokenizer", model_type="llama"
    )

    class Constant:
        def __init__(self, token_id: int) -> None:
            self.token_id = token_id

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [self.token_id]

    file = folder / "tokenizer.json"
    with pytest.raises(ValueError, match=r"tokenizer\.json: the text .* and \[9\] .* and \[8\]"):
        faithful(Constant(8), file, lambda: Constant(9))
    # What the checkpoint's settings ask for, its own class does as any other.
    kept = Constant(8)
    assert faithful(kept, file, lambda: Constant(8)) is kept
    assert faithful(kept, None, lambda: Constant(9)) is kept


def test_a_tokenizer_that_is_right_nowhere_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_byte_level(
        tmp_path / "model", tokenizer_class="LlamaTokenizer", model_type="llama"
    )
    other = byte_level(adds_bos=True)
    other.encode = lambda text, *, add_special_tokens: [7]
    plain = SimpleNamespace(from_pretrained=lambda path: other)
    monkeypatch.setattr(pretrained, "PreTrainedTokenizerFast", plain)
    with pytest.raises(CheckpointError, match=r"cannot load a tokenizer: .* and \[7\]"):
        load_tokenizer(str(folder))
