"""(b) The teacher's rows beside its forward pass: the head, the top-K, the log-probs of candidates.

Rows are made as the vLLM plugin makes them (`TokenScorer`), without vLLM: the head on as many rows
as `rows_at_once` says, then `score_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Row, arithmetic, attempted, timed
from benchmarks.gpu.parity import CANDIDATES, K
from benchmarks.gpu.sizes import Sizes
from benchmarks.models import qwen3_config
from teacher_server.engine.float32_head import Float32Head
from teacher_server.engine.row_scores import rows_at_once, score_rows

SMALL_CHUNK = 64
"""Rows of a step in which few tokens were appended."""


Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Asked:
    """What every row is asked for."""

    positions_R: Tensor
    targets_R: Tensor
    candidates_RC: Tensor
    inverse_R: Tensor


def rows(sizes: Sizes, device: str) -> Iterator[Row]:
    """Milliseconds, over those of the forward pass, and memory above what was held."""
    forward = attempted("forward pass without head", partial(forward_figures, sizes, device))
    yield forward
    over = forward.figures.get("ms")
    for hidden in sizes.heads:
        for name, made in (
            ("head's product alone", product),
            ("head and rows", scored),
            (f"head and rows, {SMALL_CHUNK} at once", partial(scored, at_once=SMALL_CHUNK)),
            ("top-K alone", topk_alone),
        ):
            work = partial(head_figures, sizes, device, hidden, made, over)
            yield attempted(f"{name}, H {hidden}", work)


def forward_figures(sizes: Sizes, device: str) -> dict[str, float]:
    """Of a decoder in the shape, over sequences that come to the rows."""
    from transformers import Qwen3Model

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = Qwen3Model(qwen3_config(sizes.shape)).to(arithmetic(device)).eval()
    ids_BS = torch.randint(
        sizes.shape.vocab, (sizes.rows // sizes.sequence, sizes.sequence), device=device
    )

    def work() -> None:
        model(input_ids=ids_BS, use_cache=False)

    with torch.inference_mode():
        work()
        found = timed(work, device)
    return {"ms": 1000 * found.seconds, "extra_gib": found.extra_gib, "of_forward": 1.0}


def head_figures(
    sizes: Sizes, device: str, hidden: int, made: Callable[..., Work], over: float | None
) -> Mapping[str, float]:
    """Of one way through all rows, beside a forward pass of so many milliseconds."""
    dtype = arithmetic(device)
    draw: dict[str, Any] = {
        "device": device,
        "generator": torch.Generator(device).manual_seed(0),
    }
    linear = torch.nn.Linear(hidden, sizes.vocab, bias=False, device=device, dtype=dtype)
    hidden_RH = torch.randn(sizes.rows, hidden, **draw).to(dtype)
    asked = Asked(
        torch.arange(sizes.rows, dtype=torch.int32, device=device),
        torch.randint(sizes.vocab, (sizes.rows,), **draw),
        torch.randint(sizes.vocab, (sizes.rows, CANDIDATES), **draw),
        torch.ones(sizes.rows, device=device),
    )
    with torch.inference_mode():
        # As the engine has it: float32 logits of a head that is not widened.
        head = Float32Head(linear)
        work = made(head, hidden_RH, asked)
        work()
        found = timed(work, device)
    figures = {"ms": 1000 * found.seconds, "extra_gib": found.extra_gib}
    return figures | ({"of_forward": 1000 * found.seconds / over} if over else {})


def product(head: Float32Head, hidden_RH: Tensor, asked: Asked) -> Work:
    """A chunk's logits, one chunk after another."""

    def work() -> None:
        for chunk in _chunks(head, hidden_RH):
            head(hidden_RH[chunk])

    return work


def scored(head: Float32Head, hidden_RH: Tensor, asked: Asked, at_once: int | None = None) -> Work:
    """Packed rows."""

    def work() -> Tensor:
        return torch.cat(
            [
                score_rows(
                    head(hidden_RH[chunk]),
                    asked.positions_R[chunk],
                    asked.targets_R[chunk],
                    asked.candidates_RC[chunk],
                    asked.inverse_R[chunk],
                    k=K,
                    extras=frozenset(),
                )
                for chunk in _chunks(head, hidden_RH, at_once)
            ]
        )

    return work


def topk_alone(head: Float32Head, hidden_RH: Tensor, asked: Asked) -> Work:
    """Of one chunk's logits, as often as there are chunks."""
    chunks = _chunks(head, hidden_RH)
    logits_RV = head(hidden_RH[chunks[0]])

    def work() -> None:
        for _ in chunks:
            logits_RV.topk(K, dim=-1)

    return work


def _chunks(head: Float32Head, hidden_RH: Tensor, at_once: int | None = None) -> list[slice]:
    size = at_once or rows_at_once(len(head.weight), hidden_RH.device.type)
    return [slice(start, start + size) for start in range(0, len(hidden_RH), size)]
