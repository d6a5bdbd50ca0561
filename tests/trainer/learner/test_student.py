"""The learner's log-probs. Run: python -m pytest tests/trainer/learner/test_student.py

Tolerance 1e-5 nats: float32 with other shapes of the same sums; the log-probs are of order 10.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from student_trainer.errors import CheckpointError
from student_trainer.learner.student import Gathered, student_forward
from student_trainer.pretrained import load_student
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import VOCAB_SIZE, tiny_student, write_tiny_student

PROMPT_LENGTHS = [2, 4, 1]
RESPONSE_LENGTHS = [5, 2, 3]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def sequences(seed: int = 0) -> list[Tensor]:
    """Prompt plus response of three rollouts."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(2, VOCAB_SIZE, (p + r,), generator=generator)
        for p, r in zip(PROMPT_LENGTHS, RESPONSE_LENGTHS, strict=True)
    ]


def run(
    model: Qwen3ForCausalLM, *, temperature: float = 1.0, extra_padding: int = 0, num_ids: int = 3
) -> Gathered:
    """student_forward over the three sequences, padded."""
    rows = sequences()
    width = max(map(len, rows)) + extra_padding
    longest = max(RESPONSE_LENGTHS) + extra_padding
    input_ids = torch.zeros(3, width, dtype=torch.long)
    response = torch.zeros(3, longest, dtype=torch.long)
    mask = torch.zeros(3, longest, dtype=torch.bool)
    for b, row in enumerate(rows):
        input_ids[b, : len(row)] = row
        response[b, : RESPONSE_LENGTHS[b]] = row[PROMPT_LENGTHS[b] :]
        mask[b, : RESPONSE_LENGTHS[b]] = True
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB_SIZE, (3, max(RESPONSE_LENGTHS), num_ids), generator=generator)
    gather = torch.zeros(3, longest, num_ids, dtype=torch.long)
    gather[:, : ids.shape[1]] = ids
    return student_forward(
        model,
        input_ids,
        torch.tensor(PROMPT_LENGTHS),
        response,
        mask,
        (gather, gather[..., :1]),
        temperature=temperature,
    )


def plain(model: Qwen3ForCausalLM, b: int, temperature: float) -> Tensor:
    """[R, V] log-probs of one sequence alone, unpadded, the shift written out."""
    row = sequences()[b]
    logits = model(row.unsqueeze(0)).logits[0]
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    # The output at position s predicts the token at s + 1.
    return logprobs[PROMPT_LENGTHS[b] - 1 : len(row) - 1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tied", [False, True])
def test_forward_equals_plain_log_softmax_with_the_shift_by_hand(
    temperature: float, tied: bool
) -> None:
    model = tiny_student(tied=tied)
    gathered = run(model, temperature=temperature)
    ids = torch.randint(0, VOCAB_SIZE, (3, 5, 3), generator=torch.Generator().manual_seed(1))
    for b, length in enumerate(RESPONSE_LENGTHS):
        expected = plain(model, b, temperature)
        response = sequences()[b][PROMPT_LENGTHS[b] :]
        own = expected[torch.arange(length), response]
        at_ids = expected.gather(-1, ids[b, :length])
        torch.testing.assert_close(gathered.logprobs_BT[b, :length], own, **CLOSE)
        torch.testing.assert_close(gathered.logprobs_at_BTN[0][b, :length], at_ids, **CLOSE)
        torch.testing.assert_close(gathered.logprobs_at_BTN[1][b, :length], at_ids[:, :1], **CLOSE)
        entropy = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(gathered.entropy_BT[b, :length], entropy, **CLOSE)


def test_padding_holds_zero() -> None:
    gathered = run(tiny_student(), extra_padding=3)
    for b, length in enumerate(RESPONSE_LENGTHS):
        for tensor in (gathered.logprobs_BT, *gathered.logprobs_at_BTN, gathered.entropy_BT):
            assert (tensor[b, length:] == 0).all()


def test_padding_on_the_right_changes_nothing() -> None:
    model = tiny_student()
    tight, loose = run(model), run(model, extra_padding=7)
    width = tight.logprobs_BT.shape[1]
    torch.testing.assert_close(loose.logprobs_BT[:, :width], tight.logprobs_BT, **CLOSE)
    torch.testing.assert_close(
        loose.logprobs_at_BTN[0][:, :width], tight.logprobs_at_BTN[0], **CLOSE
    )


def test_entropy_carries_no_gradient() -> None:
    assert not run(tiny_student()).entropy_BT.requires_grad


def test_loaded_student_is_the_saved_one_in_training_mode(tmp_path: Path) -> None:
    write_tiny_student(tmp_path, seed=4)
    loaded = load_student(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    assert loaded.training
    saved = tiny_student(seed=4).state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, saved[name])


def test_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no config.json"):
        load_student(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("config", ["{}", "{not json"])
def test_broken_checkpoint_is_named(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: cannot load a student"):
        load_student(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))


def test_checkpoint_without_weights_is_named(tmp_path: Path) -> None:
    tiny_student().config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: cannot load a student"):
        load_student(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))


def test_log_probs_of_several_prompts_are_those_of_each() -> None:
    learner = learner_of(tiny_student())
    prompts = [np.arange(2, end, dtype=np.int32) for end in (3, 9, 5)]
    tokens = [np.arange(7, end, dtype=np.int32) for end in (9, 8, 12)]
    together = learner.logprobs_of(prompts, tokens)
    for prompt, ids, found in zip(prompts, tokens, together, strict=True):
        assert found.shape == ids.shape
        np.testing.assert_allclose(found, learner.logprobs(prompt, ids), rtol=0, atol=1e-5)
        np.testing.assert_allclose(found, learner.plain_logprobs(prompt, ids), rtol=0, atol=1e-5)
