"""(f) vLLM: the teacher's engine beside the transformers engine, and the sampler's sync.

A random model, in bfloat16 on a GPU and in float32 on both, without graphs and, on a GPU, with. The
weights go through the host's memory, and on a GPU by CUDA IPC too, to a sampler that slept, and by
NCCL where there is another GPU. The checkpoint is made where it is used, and goes with the run.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.device import Row, attempted, checked, free
from benchmarks.gpu.parity import CANDIDATES, SPREAD, K
from benchmarks.gpu.sizes import Sizes
from benchmarks.models import qwen3_config, write_tokenizer
from student_trainer.pretrained import load_student, tensor_names
from student_trainer.records import SamplingOptions, WeightFormat
from student_trainer.rollouts.probe import Proof
from student_trainer.rollouts.samplers.vllm_sampler import VllmSampler
from student_trainer.rollouts.samplers.vllm_transfer import VllmTransfer
from student_trainer.rollouts.weight_sync import WeightSync
from teacher_server.engine.base import EngineRows, ScoreQuery, ScoringEngine
from teacher_server.engine.hf_engine import HfEngine
from teacher_server.engine.vllm_engine import VllmEngine
from tests.trainer.learner.made_learners import learner_of

EXACT, ROUNDED = 1e-3, 0.5
"""Nats, in float32 and in bfloat16: as a run's own sync has them."""
SHARE = 0.4
"""Of a GPU's memory."""
TEXTS, NEW_TOKENS, ROLLOUTS = 4, 32, 16
CPU_ARMS = (("teacher", "float32", True), ("sampler", "float32", True))
"""Which engine, its arithmetic, and whether it is without graphs."""
IPC, NCCL = "sampler by ipc", "sampler by nccl"
GPU_ARMS = (
    ("teacher", "bfloat16", True),
    ("sampler", "bfloat16", True),
    (IPC, "bfloat16", True),
    (NCCL, "bfloat16", True),
    ("teacher", "bfloat16", False),
    ("sampler", "bfloat16", False),
    (IPC, "bfloat16", False),
    *CPU_ARMS,
)
SLEEP_LEVEL = 2
"""Of the one by IPC."""


def rows(sizes: Sizes, device: str) -> Iterator[Row]:
    """What was never run comes first."""
    with tempfile.TemporaryDirectory(prefix="driftline-gpu-") as folder:
        model = write_model(Path(folder), sizes, device)
        free()
        for kind, dtype, eager in CPU_ARMS if device == "cpu" else GPU_ARMS:
            if kind == NCCL and torch.cuda.device_count() < 2:
                continue
            way = kind.partition(" by ")[2] or "host"
            made = teacher_figures if kind == "teacher" else partial(sampler_figures, way=way)
            name = f"{kind}, {dtype}{'' if eager else ', graphs'}"
            found = attempted(name, partial(_run, made, model, sizes, device, dtype, eager))
            free()
            if found.error:
                yield found
                continue
            limit = EXACT if dtype == "float32" else ROUNDED
            gap = checked(name, partial(found.figures.__getitem__, "gap"), limit)
            yield replace(gap, figures={**gap.figures, **found.figures})


def _run(made: Callable[..., Coroutine[Any, Any, dict[str, float]]], *of: Any) -> dict[str, float]:
    return asyncio.run(made(*of))


def write_model(folder: Path, sizes: Sizes, device: str) -> Path:
    """In float32, made on the device."""
    from transformers import Qwen3ForCausalLM

    shape = sizes.engine_shape
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = qwen3_config(shape, **ends, initializer_range=SPREAD / 2, dtype="float32")
    torch.manual_seed(0)
    with torch.device(device):
        Qwen3ForCausalLM(config).float().save_pretrained(folder)
    write_tokenizer(shape.vocab, folder)
    return folder


def _cores(device: str) -> str:
    return str(max(os.sched_getaffinity(0))) if device == "cpu" else "auto"


async def teacher_figures(
    model: Path, sizes: Sizes, device: str, dtype: str, eager: bool
) -> dict[str, float]:
    """Start, rows a second of texts scored at once in pieces, and the gap to transformers."""
    length = sizes.engine_tokens
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, sizes.engine_shape.vocab, length, dtype=np.int32)] * TEXTS
    texts = [np.roll(text, number) for number, text in enumerate(texts)]
    engine = VllmEngine(
        model=str(model),
        dtype=dtype,
        max_context=length,
        kv_cache_gib=0.05 if device == "cpu" else 2.0,
        gpu_memory_utilization=SHARE,
        max_num_seqs=2 * TEXTS,
        max_num_batched_tokens=max(64, length),
        enforce_eager=eager,
        cpu_cores=_cores(device),
    )
    started = time.monotonic()
    await engine.start()
    try:
        start_s = time.monotonic() - started
        await _scored(engine, [text[: length // 2] for text in texts], length // 4)
        began = time.monotonic()
        found = await _scored(engine, texts, length // 4)
        seconds = time.monotonic() - began
    finally:
        await engine.close()
    reference = HfEngine(model=str(model), dtype=dtype, max_context=length, device=device)
    await reference.start()
    try:
        expected = await _scored(reference, texts, length // 4)
    finally:
        await reference.close()
    gap = max(_gap(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    num_rows = sum(len(each.token_logprobs) for each in found)
    return {"gap": gap, "start_s": start_s, "rows_per_s": num_rows / seconds}


async def _scored(
    engine: ScoringEngine, texts: list[NDArray[np.int32]], first_row: int
) -> list[EngineRows]:
    rng = np.random.default_rng(1)
    vocab = engine.info.vocab_size

    def query(number: int, text: NDArray[np.int32]) -> ScoreQuery:
        shape = (len(text) - first_row, CANDIDATES)
        return ScoreQuery(
            token_ids=text,
            first_row=first_row,
            candidate_ids=rng.integers(0, vocab, shape, dtype=np.int32),
            k=K,
            temperature=1.0,
            session=str(number),
        )

    queries = [query(number, text) for number, text in enumerate(texts)]
    return list(await asyncio.gather(*map(engine.score, queries)))


def _gap(ours: EngineRows, theirs: EngineRows) -> float:
    """Of tokens and candidates; of the top-k by rank, for of equals any may be in it."""
    assert ours.candidate_logprobs is not None
    assert theirs.candidate_logprobs is not None
    return float(
        max(
            np.abs(ours.token_logprobs - theirs.token_logprobs).max(),
            np.abs(ours.topk_logprobs - theirs.topk_logprobs).max(),
            np.abs(ours.candidate_logprobs - theirs.candidate_logprobs).max(),
        )
    )


async def sampler_figures(
    model: Path, sizes: Sizes, device: str, dtype: str, eager: bool, way: str = "host"
) -> dict[str, float]:
    """Start, a run's own proof of what arrives, a sync beside rollouts, tokens a second."""
    where, length = torch.device(device), sizes.engine_tokens
    if where.type == "cuda":
        where = torch.device("cuda", torch.cuda.current_device())
    student = load_student(str(model), dtype=torch.float32, device=where)
    learner = learner_of(student, dtype=getattr(torch, dtype))
    rng = np.random.default_rng(2)
    prompts = [
        rng.integers(2, sizes.engine_shape.vocab, n, dtype=np.int32) for n in (length // 2, 12)
    ]
    sampler = _sampler(model, length, device, dtype, eager, where, way)
    by_gpu = way != "host"
    written = WeightFormat(
        dtype=dtype, as_saved=True, device=str(where) if by_gpu else "cpu", is_announced=by_gpu
    )
    limit = EXACT if dtype == "float32" else ROUNDED
    sync = WeightSync(
        learner, sampler, probe_prompts=prompts, max_logprob_gap=limit, written=written
    )
    proof = Proof(
        prompts=prompts,
        is_fresh=dtype == "float32",
        is_as_loaded=True,
        checkpoint_names=tensor_names(str(model)),
    )
    started = time.monotonic()
    try:
        await sampler.start()
        start_s = time.monotonic() - started
        gaps = await sync.prove(0, proof)
        began = time.monotonic()
        tokens = await _generated(sampler, prompts[1])
        generating = time.monotonic() - began
        rollouts = asyncio.ensure_future(_generated(sampler, prompts[1]))
        await asyncio.sleep(0)
        began = time.monotonic()
        pushed = await sync.push(1)
        pushing = time.monotonic() - began
        await rollouts
        slept = await _slept(sampler, sync) if way == "ipc" else {}
    finally:
        await sampler.close()
    every: list[Any] = [gap for gap in gaps.figures().values() if gap is not None]
    return {
        "gap": max(pushed, *every),
        "start_s": start_s,
        "tokens_per_s": tokens / generating,
        "sync_s": pushing,
        **slept,
    }


def _sampler(
    model: Path, length: int, device: str, dtype: str, eager: bool, own: torch.device, way: str
) -> VllmSampler:
    """Not started; `own` is the learner's device."""
    return VllmSampler(
        model=str(model),
        dtype=dtype,
        max_context=length,
        max_num_topk=8,
        max_num_seqs=ROLLOUTS,
        stream_interval=8,
        kv_cache_gib=0.1,
        gpu_memory_utilization=SHARE,
        enforce_eager=eager,
        cpu_cores=_cores(device),
        gpus=(1,) if way == "nccl" else (),
        seed=0,
        transfer=None if way == "host" else VllmTransfer(backend=way, device=own),
        sleep_level=SLEEP_LEVEL if way == "ipc" else 0,
    )


async def _slept(sampler: VllmSampler, sync: WeightSync) -> dict[str, float]:
    """What a sampler gives up while it sleeps, and how long it takes to have new weights then."""
    free_before = torch.cuda.mem_get_info()[0]
    began = time.monotonic()
    await sampler.sleep()
    asleep = time.monotonic()
    freed = torch.cuda.mem_get_info()[0] - free_before
    await sync.push(2)
    return {
        "sleep_s": asleep - began,
        "freed_gib": freed / 2**30,
        "sync_asleep_s": time.monotonic() - asleep,
    }


async def _generated(sampler: VllmSampler, prompt: NDArray[np.int32]) -> int:
    """Tokens of all rollouts, which are generated at once."""

    async def one(number: int) -> int:
        options = SamplingOptions(max_tokens=NEW_TOKENS, temperature=1.0, seed=number, num_topk=8)
        parts = sampler.generate(f"gpu-{time.monotonic_ns()}-{number}", prompt, options)
        return sum([len(part) async for part in parts])

    return sum(await asyncio.gather(*map(one, range(ROLLOUTS))))
