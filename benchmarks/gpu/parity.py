"""(a) What a device computes beside a CPU: the teacher's kernels, the learner's, an engine.

What is expected is made on the CPU by other code than what is tried: all logits at once, in float64
where there is no arithmetic to compare, and plain `model(ids).logits`.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.device import Row, attempted, checked
from benchmarks.gpu.sizes import Sizes
from benchmarks.learner_child import IDS
from benchmarks.models import SHAPES, qwen3_config
from student_trainer.learner.families import attention_for, plain_logits
from student_trainer.learner.head import Head
from student_trainer.learner.head_logprobs import head_logprobs, reference_logprobs
from student_trainer.learner.student import student_forward
from teacher_server.engine.base import EXTRAS, ScoreQuery
from teacher_server.engine.float32_head import Float32Head
from teacher_server.engine.hf_engine import HfEngine
from teacher_server.engine.row_format import EXTRA_AT, HEADER, TOKEN_LOGPROB
from teacher_server.engine.row_scores import score_rows, topk_in_blocks

K, CANDIDATES = 32, 16
HIDDEN, SPREAD = 256, 0.1
"""Width of the heads, and of what random weights are drawn with: log-probs that are told apart."""
EXACT, ROUNDED, GRADIENT = 1e-4, 0.2, 2e-2
"""Limits in nats, of float32 and of bfloat16, and of a bfloat16 gradient to its largest entry."""
DTYPES = (torch.float32, torch.bfloat16)
SHAPE = SHAPES["tiny"]


def rows(sizes: Sizes, device: str) -> Iterator[Row]:
    """Gaps in nats, or of gradients relative to the largest."""
    for dtype in DTYPES:
        name = f"score_rows, {_name(dtype)} logits"
        yield checked(name, partial(scoring_gap, sizes, device, dtype), EXACT)
    yield checked("topk_in_blocks", partial(topk_gap, sizes, device), 0.0)
    half = torch.bfloat16
    yield checked("teacher's head, bfloat16", partial(head_gap, sizes, device, half), EXACT)
    for dtype, limit in zip(DTYPES, (EXACT, GRADIENT), strict=True):
        name = f"learner's head, {_name(dtype)}"
        made = attempted(name, partial(learner_head_gaps, sizes, device, dtype))
        if made.error:
            yield made
            continue
        for figure, bound in (("log-probs", EXACT), ("gradients", limit)):
            yield checked(f"{name}, {figure}", partial(made.figures.__getitem__, figure), bound)
    model = random_model()
    for dtype, limit in zip(DTYPES, (EXACT, ROUNDED), strict=True):
        name = f"student_forward, {_name(dtype)}"
        yield checked(name, partial(student_gap, model, sizes, device, dtype), limit)
    for dtype, limit in zip(DTYPES, (EXACT, ROUNDED), strict=True):
        name = f"transformers engine, {_name(dtype)}"
        yield checked(name, partial(engine_gap, model, sizes, device, dtype), limit)


def scoring_gap(sizes: Sizes, device: str, dtype: torch.dtype) -> float:
    """Of every column of the packed rows, and of the entries of the top-k that ids name."""
    draw = torch.Generator().manual_seed(0)
    num_rows, vocab = sizes.parity_rows, sizes.vocab
    logits_RV = torch.randn(num_rows, vocab, generator=draw).mul_(4).to(dtype)
    targets_R = torch.randint(vocab, (num_rows,), generator=draw)
    candidates_RC = torch.randint(vocab, (num_rows, CANDIDATES), generator=draw)
    inverse_R = 0.5 + torch.rand(num_rows, generator=draw)
    packed_RW = score_rows(
        logits_RV.to(device, copy=True),
        torch.arange(num_rows, dtype=torch.int32, device=device),
        targets_R.to(device),
        candidates_RC.to(device),
        inverse_R.to(device),
        k=K,
        extras=EXTRAS,
    ).cpu()
    floats_RW, exact_RV = packed_RW.view(torch.float32), logits_RV.double()
    logprobs_RV = exact_RV.mul(inverse_R.double()[:, None]).log_softmax(-1)
    top_RK = floats_RW[:, HEADER + K : HEADER + 2 * K]
    ids_RK = packed_RW[:, HEADER : HEADER + K].long()
    ranks_R = 1 + (exact_RV > exact_RV.gather(1, targets_R[:, None])).sum(-1)
    return _largest(
        floats_RW[:, TOKEN_LOGPROB] - logprobs_RV.gather(1, targets_R[:, None])[:, 0],
        top_RK - logprobs_RV.topk(K).values,
        top_RK - logprobs_RV.gather(1, ids_RK),
        floats_RW[:, HEADER + 2 * K :] - logprobs_RV.gather(1, candidates_RC),
        floats_RW[:, EXTRA_AT["entropies"]] + (logprobs_RV.exp() * logprobs_RV).sum(-1),
        packed_RW[:, EXTRA_AT["token_ranks"]] - ranks_R,
    )


def topk_gap(sizes: Sizes, device: str) -> float:
    """Of its values, and of the logits at its ids."""
    draw = torch.Generator().manual_seed(1)
    logits_RV = torch.randn(sizes.parity_rows, sizes.vocab, generator=draw)
    top_RK, ids_RK = (found.cpu() for found in topk_in_blocks(logits_RV.to(device), K))
    return _largest(top_RK - logits_RV.topk(K).values, top_RK - logits_RV.gather(1, ids_RK))


def head_gap(sizes: Sizes, device: str, dtype: torch.dtype) -> float:
    """Of logits of the order of one."""
    draw = torch.Generator().manual_seed(2)
    linear = torch.nn.Linear(HIDDEN, sizes.vocab, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(sizes.vocab, HIDDEN, generator=draw) * SPREAD)
    hidden_RD = torch.randn(sizes.parity_rows, HIDDEN, generator=draw).to(dtype)
    expected_RV = hidden_RD.double() @ linear.weight.detach().double().T
    with torch.inference_mode():
        found_RV = Float32Head(linear.to(device))(hidden_RD.to(device)).cpu()
    return _largest(found_RV - expected_RV)


def learner_head_gaps(sizes: Sizes, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Of log-probs and entropies, and of both gradients to their largest entries."""
    draw = torch.Generator().manual_seed(3)
    weight_VD = torch.randn(sizes.vocab, HIDDEN, generator=draw) * SPREAD
    hidden_RD = torch.randn(sizes.parity_rows, HIDDEN, generator=draw)
    ids_RN = torch.randint(sizes.vocab, (sizes.parity_rows, IDS), generator=draw)
    factor_RN = torch.randn(sizes.parity_rows, IDS, generator=draw)

    def made(function: Any, where: str) -> list[Tensor]:
        weight, hidden = (
            tensor.to(where, copy=True).requires_grad_() for tensor in (weight_VD, hidden_RD)
        )
        logprobs_RN, entropy_R = function(
            Head(weight_VD=weight), hidden, ids_RN.to(where), dtype=dtype
        )
        logprobs_RN.backward(factor_RN.to(where))
        found = (logprobs_RN, entropy_R, weight.grad, hidden.grad)
        return [tensor.detach().float().cpu() for tensor in found]

    found, expected = made(head_logprobs, device), made(reference_logprobs, "cpu")
    gaps = [_largest(ours - theirs) for ours, theirs in zip(found, expected, strict=True)]
    relative = [gap / float(of.abs().max()) for gap, of in zip(gaps[2:], expected[2:], strict=True)]
    return {"log-probs": max(gaps[:2]), "gradients": max(relative)}


def random_model() -> Any:
    """A small student in float32 on the CPU, its distributions far from uniform."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    config = qwen3_config(SHAPE, initializer_range=SPREAD, dtype="float32")
    return Qwen3ForCausalLM(config).float().train()


def student_gap(model: Any, sizes: Sizes, device: str, dtype: torch.dtype) -> float:
    """Of a response's tokens and of further ids, as the learner asks for them."""
    num_tokens, prompt = sizes.parity_tokens, sizes.parity_tokens // 4
    draw = torch.Generator().manual_seed(4)
    ids_BS = torch.randint(SHAPE.vocab, (2, num_tokens), generator=draw)
    asked_BTN = torch.randint(SHAPE.vocab, (2, num_tokens - prompt, K), generator=draw)
    there = deepcopy(model).to(device)
    kind = attention_for(model.config, "auto", dtype=dtype, device=torch.device(device))
    if kind is not None:
        there.set_attn_implementation(kind)
    with torch.no_grad():
        found = student_forward(
            there,
            ids_BS.to(device),
            torch.full((2,), prompt, device=device),
            ids_BS[:, prompt:].to(device),
            torch.ones(2, num_tokens - prompt, dtype=torch.bool, device=device),
            (asked_BTN.to(device),),
            temperature=1.0,
            dtype=dtype,
        )
        logprobs_BTV = plain_logits(model, ids_BS).log_softmax(-1)[:, prompt - 1 : -1]
    return _largest(
        found.logprobs_BT.cpu() - logprobs_BTV.gather(2, ids_BS[:, prompt:, None])[..., 0],
        found.logprobs_at_BTN[0].cpu() - logprobs_BTV.gather(2, asked_BTN),
    )


def engine_gap(model: Any, sizes: Sizes, device: str, dtype: torch.dtype) -> float:
    """Of a text that grows, its candidates and its top-k; weights are rounded on both sides."""
    rounded = deepcopy(model).to(dtype)
    with tempfile.TemporaryDirectory(prefix="driftline-gpu-") as folder:
        rounded.save_pretrained(folder)
        return asyncio.run(_engine_gap(rounded.float(), Path(folder), sizes, device, dtype))


async def _engine_gap(
    plain: Any, folder: Path, sizes: Sizes, device: str, dtype: torch.dtype
) -> float:
    num_tokens = sizes.parity_tokens
    rng = np.random.default_rng(5)
    text = rng.integers(2, SHAPE.vocab, num_tokens, dtype=np.int32)
    candidates = rng.integers(0, SHAPE.vocab, (num_tokens, CANDIDATES), dtype=np.int32)
    with torch.no_grad():
        logits_SV = plain_logits(plain, torch.from_numpy(text).long()[None])[0, :-1]
    expected = logits_SV.double().log_softmax(-1).numpy()
    engine = HfEngine(model=str(folder), dtype=_name(dtype), max_context=num_tokens, device=device)
    await engine.start()
    try:
        gaps = []
        for first, end in ((num_tokens // 8, num_tokens // 2), (num_tokens // 2, num_tokens)):
            asked = candidates[first:end]
            query = ScoreQuery(
                token_ids=text[:end],
                first_row=first,
                candidate_ids=asked,
                k=K,
                temperature=1.0,
                session="one",
            )
            found = await engine.score(query)
            wanted = expected[first - 1 : end - 1]
            at = np.take_along_axis(wanted, text[first:end, None].astype(np.int64), 1)[:, 0]
            said = np.take_along_axis(wanted, found.topk_ids.astype(np.int64), 1)
            beside = np.take_along_axis(wanted, asked.astype(np.int64), 1)
            assert found.candidate_logprobs is not None
            gaps += [
                np.abs(found.token_logprobs - at).max(),
                np.abs(found.topk_logprobs - said).max(),
                np.abs(found.candidate_logprobs - beside).max(),
            ]
    finally:
        await engine.close()
    return float(np.max(gaps))


def _largest(*differences: Tensor) -> float:
    """NaN where one is none."""
    return float(torch.stack([each.double().abs().max() for each in differences]).max())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
