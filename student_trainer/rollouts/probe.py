"""Learner against sampler before there is anything to lose: on which prompts, and what a gap means.

Knows no model; the learner says what it computes and what of its config tells families apart.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

PROBE_TOKENS = 8
"""Sampled after each prompt before the first rollout."""
SYNC_PROMPTS, SYNC_PROMPT_TOKENS, SYNC_TOKENS = 4, 8, 2
"""Asked at once after every sync, how long each is, and sampled after each. Any prompt tells which
weights a sampler has, each token of a batch costs a pass over all of them, and a row of it little.
"""
CACHE_BLOCK = 128
"""Tokens of vLLM's block of keys and values on a CPU; 16 on a GPU."""
LONGEST_WINDOW_ON_A_CPU = 1024
"""Of a sliding attention that a probe still goes beyond; a longer prompt would take minutes."""
HF = 'sampler.kind = "hf_batched"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What is held against what before the first rollout."""

    prompts: Sequence[NDArray[np.int32]]
    is_fresh: bool
    """The student was not trained yet: plain transformers says what it should be."""
    is_as_loaded: bool
    """The sampler has just loaded the checkpoint that the learner began with."""
    checkpoint_names: Collection[str] | None = None
    """Of the tensors there; None where they are not known, or not what the sampler reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartGaps:
    """Largest differences of log-probs before the first rollout, in nats; None: not compared."""

    plain: float | None = None
    """Learner and plain `model(ids).logits`, for a student that has not been trained."""
    loaded: float | None = None
    """Learner and sampler as it loaded the checkpoint."""
    changed: float | None = None
    """Learner and sampler after every weight was changed and sent."""
    pushed: float | None = None
    """Learner and sampler after the learner's own weights were sent."""

    def figures(self) -> dict[str, float | None]:
        """By name."""
        return asdict(self)


def probe_prompts(
    prompts: Sequence[NDArray[np.int32]], *, max_context: int, sliding_window: int | None
) -> list[NDArray[np.int32]]:
    """Two prompts, made of the run's own, that are longer than a cache block and a sliding window.

    The second begins with a block of the first, and so reads it from the sampler's cache. As far
    as `max_context` goes, in which responses must have room.
    """
    longest = max(1, max_context - PROBE_TOKENS)
    text = np.concatenate([*prompts])
    first = np.resize(text, min(max(CACHE_BLOCK, sliding_window or 0) + PROBE_TOKENS, longest))
    second = np.concatenate([first[:CACHE_BLOCK], np.resize(text[::-1], 2 * PROBE_TOKENS)])
    return [first, second[:longest]]


def sync_prompts(prompts: Sequence[NDArray[np.int32]]) -> list[NDArray[np.int32]]:
    """Short pieces from all over the run's own prompts, whose ends may all be alike."""
    text = np.concatenate([*prompts])
    starts = np.linspace(0, max(0, len(text) - SYNC_PROMPT_TOKENS), SYNC_PROMPTS).astype(int)
    return [text[start : start + SYNC_PROMPT_TOKENS] for start in starts]


def gap_of(left: Sequence[NDArray[np.float32]], right: Sequence[NDArray[np.float32]]) -> float:
    """Largest difference; NaN where one is none. numpy's maximum, unlike max(), loses no NaN."""
    return float(np.max([np.abs(a - b).max() for a, b in zip(left, right, strict=True)]))


def cause_as_loaded(about: str, sampler_dtype: str | None, plain: float | None) -> str:
    """Why a sampler that has just loaded the checkpoint differs from the learner."""
    right = (
        f"the learner is within {plain:.2g} nats of plain model(ids).logits, so the sampler"
        if plain is not None
        else "the sampler"
    )
    return (
        f"{right} computes this family otherwise (scale, soft-cap, attention, precision): "
        f"the learner is {about}, the sampler's arithmetic {sampler_dtype or 'as loaded'}. "
        f"{_precision(about, sampler_dtype)}{HF} computes it by the learner's own code"
    )


def cause_after_push(about: str, sampler_dtype: str | None, *, was_equal: bool) -> str:
    """Why the sampler differs since the learner's weights were sent."""
    before = "as loaded the two were equal, so " if was_equal else ""
    return (
        f"{before}the weights do not arrive: their names or their layout "
        f"are not what the sampler reads; the learner is {about}, the weights are sent in "
        f"{sampler_dtype or 'their own arithmetic'}. {HF} reads them as they are"
    )


def cause_of_plain(about: str) -> str:
    """Why the learner differs from plain transformers."""
    return (
        f"the learner is {about}; in float32 this family cannot be trained, in bfloat16 it is the "
        'arithmetic: student.dtype = "float32", or a larger optim.max_sync_gap_nats'
    )


def _precision(about: str, sampler_dtype: str | None) -> str:
    if "bfloat16" not in about and sampler_dtype in (None, "float32"):
        return ""
    return (
        "Where it is the arithmetic alone: the same dtype on both sides (student.dtype, "
        "sampler.dtype), or a larger optim.max_sync_gap_nats. Else "
    )
