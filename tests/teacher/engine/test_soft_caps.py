"""The transformers engine on families whose attention is not everybody's.

Run: pytest tests/teacher/engine/test_soft_caps.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from teacher_server.engine.base import ScoreQuery
from teacher_server.engine.hf_engine import HfEngine
from tests.trainer.learner.tiny_families import VOCAB_SIZE, tiny_family

CLOSE = 1e-4
NUM_TOKENS = 24


@pytest.mark.asyncio
@pytest.mark.parametrize("family", ["gemma2", "mistral", "gemma3"])
async def test_rows_are_those_of_eager_attention(family: str, tmp_path: Path) -> None:
    """Of a soft-cap of the attention's scores, which sdpa leaves out; of a sliding window; with a
    tower of another kind around the text part."""
    model = tiny_family(family).eval()
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(2, VOCAB_SIZE, NUM_TOKENS, dtype=np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long()[None]).logits[0].float()
    expected = logits.log_softmax(-1)[
        torch.arange(NUM_TOKENS - 1), torch.from_numpy(ids[1:]).long()
    ]
    engine = HfEngine(model=str(tmp_path), max_context=64, device="cpu")
    await engine.start()
    try:
        rows = await engine.score(
            ScoreQuery(token_ids=ids, first_row=1, candidate_ids=None, k=4, temperature=1.0)
        )
    finally:
        await engine.close()
    assert np.abs(rows.token_logprobs - expected.numpy()).max() < CLOSE
