"""(d) FSDP2 on one process: that a spread student learns what a plain one does, and how fast.

The process group is NCCL's on a GPU and gloo's on a CPU, with one member: what is not tried is what
travels between several.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.device import Row, attempted, checked, free, held_gib, timed
from benchmarks.gpu.learner import learners, optimizer_of
from benchmarks.gpu.parity import random_model
from benchmarks.gpu.sizes import Sizes
from benchmarks.learner_child import random_student
from student_trainer.learner.export import exported
from student_trainer.learner.sharding import is_spread, spread, whole
from student_trainer.learner.student import response_logprobs
from student_trainer.records import AS_LEARNT

RELATIVE = 1e-3
"""To the largest entry, or to the norm: sums in another order, rounded to bfloat16 on a GPU."""


def rows(sizes: Sizes, device: str) -> Iterator[Row]:
    """Gaps to a plain student, relative to the largest; then both at a size that takes time."""
    with alone(device):
        gaps = attempted("one update", partial(gaps_of_an_update, sizes, device))
        if gaps.error:
            yield gaps
        for name in gaps.figures:
            yield checked(name, partial(gaps.figures.__getitem__, name), RELATIVE)
        for name in ("plain", "spread"):
            work = partial(figures, sizes, device, is_wanted=name == "spread")
            yield attempted(f"{name}, {sizes.sharded_tokens:,} tokens", work)
            free()


@contextmanager
def alone(device: str) -> Iterator[None]:
    """A process group of this process, for as long as the block lasts."""
    if device != "cpu":
        torch.cuda.set_device(0)
    with tempfile.TemporaryDirectory(prefix="driftline-gpu-") as folder:
        dist.init_process_group(
            "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
            init_method=f"file://{Path(folder) / 'store'}",
            rank=0,
            world_size=1,
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


def gaps_of_an_update(sizes: Sizes, device: str) -> dict[str, float]:
    """Of every gradient, of the norm that an update finds, and of the weights that it leaves."""
    tokens = min(sizes.parity_tokens, sizes.sharded_tokens)
    plain = random_model().to(device)
    other = deepcopy(plain)
    spread(other, response_logprobs)
    assert is_spread(other)
    norms: list[float] = []
    sent: list[dict[str, torch.Tensor]] = []
    gradients: list[list[torch.Tensor]] = []
    for model in (plain, other):
        learners(model, tokens, device)(tokens)
        gradients.append([whole(p.grad) for p in model.parameters() if p.grad is not None])
        norms.append(optimizer_of(model).step(1.0 / tokens))
        sent.append(dict(exported(model, AS_LEARNT)))
    assert len(gradients[0]) == len(gradients[1])
    pairs = zip(*gradients, strict=True)
    return {
        "gradients": max(_relative(theirs, ours) for theirs, ours in pairs),
        "norm": abs(norms[1] - norms[0]) / norms[0],
        "weights as they are sent": max(
            _relative(tensor, sent[1][name]) for name, tensor in sent[0].items()
        ),
    }


def figures(sizes: Sizes, device: str, *, is_wanted: bool) -> dict[str, float]:
    """Tokens a second of forward and backward, and of the optimiser's step by itself."""
    tokens = sizes.sharded_tokens
    model: Any = random_student(sizes.sharded_shape, tokens, device)
    if is_wanted:
        spread(model, response_logprobs)
    optimizer, update = optimizer_of(model), learners(model, tokens, device)
    update(tokens)
    optimizer.step(1.0 / tokens)
    update(tokens)
    held = held_gib(device)
    passes = timed(lambda: update(tokens), device)
    steps = timed(lambda: optimizer.step(1.0), device, before=lambda: update(tokens))
    return {
        "tokens_per_s": tokens / passes.seconds,
        "extra_gib": passes.extra_gib,
        "held_gib": held,
        "optimizer_ms": 1000 * steps.seconds,
    }


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    gap = (found.double() - expected.double()).abs().max()
    return float(gap / expected.double().abs().max().clamp(min=1e-30))
