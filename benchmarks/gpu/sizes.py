"""How large everything is: on a GPU, on a CPU, and in a test."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.learner_child import SMALL
from benchmarks.models import SHAPES, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of all parts."""

    product: int
    """Side of the matrices by which a card's rate is measured."""
    copied: int
    """Bytes by which its memory is."""
    vocab: int
    parity_rows: int
    parity_tokens: int
    """Of a text that is scored in pieces."""
    shape: Shape
    """Of the student, and of the teacher's forward pass."""
    rows: int
    sequence: int
    """Tokens of each of the sequences that come to so many rows."""
    heads: tuple[int, ...]
    """Hidden sizes."""
    tokens: tuple[int, ...]
    """Of the learner's sequences."""
    sharded_shape: Shape
    sharded_tokens: int
    rollouts: int
    """A step."""
    response: int
    """Tokens of each at most."""
    engine_shape: Shape
    engine_tokens: int
    """Of each text that vLLM scores."""


FULL = Sizes(
    product=8192,
    copied=4 << 30,
    vocab=151_936,
    parity_rows=256,
    parity_tokens=1024,
    shape=SHAPES["qwen3-1.7b"],
    rows=8192,
    sequence=2048,
    heads=(2048, 4096),
    tokens=(8192, 16_384),
    sharded_shape=SHAPES["qwen3-0.6b"],
    sharded_tokens=4096,
    rollouts=64,
    response=288,
    engine_shape=replace(SHAPES["qwen3-0.6b"], layers=8),
    engine_tokens=1024,
)
ON_CPU = Sizes(
    product=1024,
    copied=64 << 20,
    vocab=SMALL.vocab,
    parity_rows=64,
    parity_tokens=160,
    shape=SMALL,
    rows=512,
    sequence=128,
    heads=(256,),
    tokens=(256, 512),
    sharded_shape=SMALL,
    sharded_tokens=256,
    rollouts=8,
    response=32,
    engine_shape=SHAPES["tiny"],
    engine_tokens=96,
)
TINY = replace(
    ON_CPU,
    product=128,
    copied=1 << 20,
    vocab=600,
    parity_rows=8,
    parity_tokens=40,
    shape=SHAPES["tiny"],
    rows=16,
    sequence=8,
    heads=(32,),
    tokens=(24,),
    sharded_shape=replace(SHAPES["tiny"], vocab=256, hidden=32),
    sharded_tokens=24,
    rollouts=2,
    response=8,
)
SIZES = {"full": FULL, "small": ON_CPU, "tiny": TINY}
