"""Where responses end: tokens and text. Run: python -m pytest tests/trainer/test_stop_tokens.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from student_trainer.errors import ConfigError
from student_trainer.pretrained import load_generation_config, load_tokenizer
from student_trainer.records import Delta, Finish, SamplingOptions
from student_trainer.rollouts.samplers.hf_sampler import HfSampler
from student_trainer.rollouts.samplers.stop_strings import StopStringSampler
from student_trainer.stop_tokens import own_end_warnings, stop_token_ids, teacher_end_warnings
from teacher_server.process.loading import build_engine, describe
from teacher_server.process.loading import load_tokenizer as load_teacher_tokenizer
from teacher_server.settings import TeacherConfig
from teacher_wire.codec import decode_info, encode_info
from tests.trainer.data.made_tokenizers import byte_level
from tests.trainer.in_memory import InMemorySampler
from tests.trainer.learner.tiny_student import EOS_ID, character_tokenizer, write_tiny_student

CPU = torch.device("cpu")
PROMPT = np.array([2, 3, 4], np.int32)


def test_every_end_token_that_anybody_names_ends_a_response() -> None:
    tokenizer = byte_level()
    assert stop_token_ids(tokenizer, GenerationConfig()) == (1,)
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=7)) == (1, 7)
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=[7, 1]), ["<stop>"]) == (1, 7, 2)
    tokenizer.eos_token = None
    assert stop_token_ids(tokenizer, GenerationConfig()) == ()
    with pytest.raises(ConfigError, match=r"rollout\.stop_tokens: 'the cat' is not one token"):
        stop_token_ids(tokenizer, GenerationConfig(), ["the cat"])


def test_end_tokens_that_differ_are_named() -> None:
    tokenizer = byte_level()
    assert own_end_warnings(tokenizer, GenerationConfig(eos_token_id=[2, 1])) == []
    assert own_end_warnings(tokenizer, GenerationConfig()) == []
    assert teacher_end_warnings(tokenizer, (), (1,)) == []
    assert teacher_end_warnings(tokenizer, (1, 2), (1,)) == []
    (said,) = own_end_warnings(tokenizer, GenerationConfig(eos_token_id=2))
    assert said.startswith("the student's tokenizer ends with '</s>' (1), its generation_config")
    (said,) = teacher_end_warnings(tokenizer, (2,), (1,))
    assert said.startswith("the teacher ends with '<stop>' (2), at which no rollout ends")
    assert said.endswith("name it in rollout.stop_tokens")


def test_a_generation_config_is_read_or_made_of_the_config(tmp_path: Path) -> None:
    folder = write_tiny_student(tmp_path / "student")
    assert load_generation_config(str(folder)).eos_token_id == EOS_ID
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_generation_config(str(folder)).eos_token_id == [5, 6]
    (folder / "generation_config.json").unlink()
    assert load_generation_config(str(folder)).eos_token_id == EOS_ID


def test_a_teacher_tells_how_its_model_ends(tmp_path: Path) -> None:
    folder = write_tiny_student(tmp_path / "teacher")
    config = TeacherConfig(engine="hf", model=str(folder))
    tokenizer = load_teacher_tokenizer(config)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 1]}')
    engine = build_engine(config)
    told = decode_info(encode_info(describe(config, engine, tokenizer)))
    assert told.end_token_ids == (EOS_ID, 5)
    (folder / "generation_config.json").unlink()
    assert describe(config, engine, tokenizer).end_token_ids == (EOS_ID,)
    fake = TeacherConfig(engine="fake")
    assert describe(fake, build_engine(fake), None).end_token_ids == ()


async def all_of(
    sampler: HfSampler | StopStringSampler | InMemorySampler, seed: int
) -> list[Delta]:
    options = SamplingOptions(max_tokens=40, num_topk=3, seed=seed)
    return [delta async for delta in sampler.generate(f"a{seed}", PROMPT, options)]


def ids_of(deltas: list[Delta]) -> list[int]:
    return [int(token_id) for delta in deltas for token_id in delta.token_ids]


async def test_a_rollout_ends_at_the_tokenizers_end_token_though_the_model_names_another(
    tmp_path: Path,
) -> None:
    """The base student of an instruct teacher: its generation_config names a token of its own."""
    folder = write_tiny_student(tmp_path / "student")
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    ids = stop_token_ids(load_tokenizer(str(folder)), load_generation_config(str(folder)))
    assert ids == (EOS_ID, 0)
    alone = HfSampler(model=str(folder), dtype="auto", device=CPU)
    both = HfSampler(model=str(folder), dtype="auto", device=CPU, stop_ids=ids)
    await alone.start()
    await both.start()
    ended = 0
    for seed in range(12):
        without, stopped = await all_of(alone, seed), await all_of(both, seed)
        whole, kept = ids_of(without), ids_of(stopped)
        assert kept == whole[: len(kept)]
        if EOS_ID in whole:
            ended += 1
            assert kept[-1] == EOS_ID
            assert kept.index(EOS_ID) == len(kept) - 1
            assert stopped[-1].finish is Finish.STOP
    assert ended > 2


def first_end(text_of: object, ids: list[int], stops: list[str]) -> int | None:
    """The obvious way: the first prefix of the response in which a stop string stands."""
    decode = text_of
    assert callable(decode)
    for count in range(1, len(ids) + 1):
        if any(stop in decode(ids[:count]) for stop in stops):
            return count
    return None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    stops=st.lists(st.text("abc12 +", min_size=1, max_size=2), min_size=1, max_size=2),
    tokens_per_delta=st.integers(1, 7),
)
async def test_text_ends_a_response_with_the_token_that_completes_it(
    seed: int, stops: list[str], tokens_per_delta: int
) -> None:
    tokenizer = character_tokenizer()

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode([token_id % len(tokenizer) for token_id in token_ids]))

    inner = InMemorySampler(tokens_per_delta=tokens_per_delta)
    whole = await all_of(inner, seed)
    cut = await all_of(StopStringSampler(inner, stops, decode), seed)
    expected = first_end(decode, ids_of(whole), stops)
    assert ids_of(cut) == ids_of(whole)[:expected]
    assert cut[-1].finish is (whole[-1].finish if expected is None else Finish.STOP)
    for delta in cut:
        assert delta.logprobs.shape == delta.token_ids.shape
        assert delta.topk_ids.shape == (len(delta), 3)
    assert [delta.finish for delta in cut[:-1]] == [None] * (len(cut) - 1)


async def test_text_of_several_tokens_and_bytes_is_found_across_deltas() -> None:
    tokenizer = byte_level()
    ids = tokenizer("the cat says: Ωμέγα! on", add_special_tokens=False)["input_ids"]

    class Scripted(InMemorySampler):
        async def generate(self, request_id, prompt_ids, options):  # type: ignore[no-untyped-def]
            for number, token_id in enumerate(ids):
                yield Delta(
                    token_ids=np.array([token_id], np.int32),
                    logprobs=np.zeros(1, np.float32),
                    topk_ids=np.zeros((1, 0), np.int32),
                    topk_logprobs=np.zeros((1, 0), np.float32),
                    finish=Finish.LENGTH if number == len(ids) - 1 else None,
                )

    inner = Scripted()
    sampler = StopStringSampler(inner, ["μέγ"], lambda kept: str(tokenizer.decode(kept)))
    cut = await all_of(sampler, 0)
    assert tokenizer.decode(ids_of(cut)) == "the cat says: Ωμέγ"
    assert cut[-1].finish is Finish.STOP
    assert inner.aborts == ["a0"]
