"""What is said of a checkpoint before it is loaded."""

from __future__ import annotations

import pytest
import torch

from teacher_server.engine.checkpoint import warn_if_emulated


@pytest.mark.parametrize(
    ("dtype", "capabilities", "warned"),
    [
        ("bfloat16", {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, True),
        ("bfloat16", {"avx2": True, "avx512_bf16": True}, False),
        ("bfloat16", {"bf16": True}, False),
        ("float32", {"avx2": True}, False),
    ],
)
def test_a_dtype_that_the_cpu_lacks_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: str,
    capabilities: dict[str, bool],
    warned: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    warn_if_emulated(dtype)
    assert ("no bfloat16 arithmetic" in caplog.text) == warned
