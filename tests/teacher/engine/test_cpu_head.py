"""The head in blocks equals one product in float32: pytest tests/teacher/engine/test_cpu_head.py"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_server.engine import cpu_head
from teacher_server.engine.cpu_head import logits_in_blocks


@given(
    num_rows=st.integers(0, 9),
    vocab_size=st.integers(1, 70),
    at_once=st.integers(1, 700),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    with_bias=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_blocks_of_any_size_equal_one_product(
    num_rows: int, vocab_size: int, at_once: int, dtype: torch.dtype, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(num_rows + vocab_size)
    hidden_RH = torch.randn(num_rows, 8, generator=generator).to(dtype)
    weight_VH = torch.randn(vocab_size, 8, generator=generator).to(dtype)
    bias_V = torch.randn(vocab_size, generator=generator).to(dtype) if with_bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_head, "WEIGHTS_AT_ONCE", at_once)
        logits_RV = logits_in_blocks(hidden_RH, weight_VH, bias_V)
    expected_RV = torch.nn.functional.linear(
        hidden_RH.float(), weight_VH.float(), None if bias_V is None else bias_V.float()
    )
    assert logits_RV.dtype == torch.float32
    torch.testing.assert_close(logits_RV, expected_RV, rtol=1e-5, atol=1e-5)


def test_a_broken_row_stays_by_itself() -> None:
    hidden_RH = torch.ones(3, 8)
    hidden_RH[1] = float("nan")
    logits_RV = logits_in_blocks(hidden_RH, torch.ones(20, 8))
    assert logits_RV.isnan().all(1).tolist() == [False, True, False]


def test_logits_are_not_rounded_to_the_dtype_of_the_weights() -> None:
    """257 is no bfloat16: it would be 256."""
    ones = torch.ones(1, 257, dtype=torch.bfloat16)
    assert logits_in_blocks(ones, ones).item() == 257.0
