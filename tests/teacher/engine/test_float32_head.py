"""Logits that are not rounded: pytest tests/teacher/engine/test_float32_head.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from teacher_server.engine.float32_head import Float32Head, widen_head
from teacher_server.engine.hf_engine import HfEngine
from tests.teacher.engine.engine_models import write_tiny_model
from tests.teacher.engine.engine_queries import TOLERANCE, K, a_query, random_ids
from tests.trainer.learner.tiny_student import tiny_student

RANK = 16


def share_of_ties(logits_RV: torch.Tensor) -> float:
    """Of rows whose 16th and 17th logit are equal."""
    top = logits_RV.topk(RANK + 1).values
    return float((top[:, RANK - 1] == top[:, RANK]).float().mean())


def test_a_bfloat16_head_ties_in_a_large_vocabulary_and_this_one_does_not() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 50_000, bias=True, dtype=torch.bfloat16)
    hidden = torch.randn(2, 50, 64).to(torch.bfloat16)
    with torch.inference_mode():
        rounded, wide = head(hidden), Float32Head(head)(hidden)
    assert wide.dtype == torch.float32
    assert wide.shape == (2, 50, 50_000)
    assert share_of_ties(rounded.flatten(0, 1)) > 0.2
    assert share_of_ties(wide.flatten(0, 1)) < 0.01
    exact = torch.nn.functional.linear(hidden.double(), head.weight.double(), head.bias.double())
    assert (wide - exact).abs().max() < 1e-5


def test_a_tied_head_is_widened_and_the_embedding_is_not() -> None:
    model = tiny_student(tied=True).to(torch.bfloat16).eval()
    ids = torch.arange(4, 20)[None]
    with torch.inference_mode():
        rounded = model(ids).logits
        widen_head(model)
        wide = model(ids).logits
    assert (rounded.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert torch.equal(wide.to(torch.bfloat16), rounded)


def test_a_float32_model_is_left_as_it_is() -> None:
    model = tiny_student(tied=False)
    head = model.get_output_embeddings()
    widen_head(model)
    assert model.get_output_embeddings() is head


async def test_rows_of_a_bfloat16_checkpoint_are_not_rounded(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    token_ids = random_ids(12, 200)
    with torch.inference_mode():
        hidden = model.model(torch.from_numpy(token_ids[:-1]).long()[None]).last_hidden_state[0]
        logits = hidden.float() @ model.lm_head.weight.float().T
    engine = HfEngine(model=str(model_dir), dtype="bfloat16", max_context=256, device="cpu")
    await engine.start()
    rows = await engine.score(a_query(token_ids, 1))
    await engine.close()
    expected = logits.log_softmax(-1).topk(K).values.numpy()
    assert np.abs(rows.topk_logprobs - expected).max() < TOLERANCE
