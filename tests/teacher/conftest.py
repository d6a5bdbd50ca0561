"""Checkpoints shared by the teacher's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.teacher.engine.engine_models import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer float32 Qwen3 (vocabulary 512) with a byte-level tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))
