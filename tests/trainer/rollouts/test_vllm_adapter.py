"""An adapter beside its base in vLLM: the learner's log-probs, whatever was cached or under way.

One engine for the module. Run: python -m pytest -m vllm tests/trainer/rollouts/test_vllm_adapter.py
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from student_trainer.errors import WeightSyncError
from student_trainer.learner.adapter import (
    ADAPTER_FILE,
    ALL_LINEAR,
    CONFIG_FILE,
    Adapter,
    LoraShape,
    adapted,
    new_config,
    written_config,
)
from student_trainer.learner.learner import Learner
from student_trainer.records import SamplingOptions, WeightFormat, WrittenTensor
from student_trainer.rollouts.probe import CACHE_BLOCK, Proof, probe_prompts
from student_trainer.rollouts.samplers.vllm_adapter import AdapterInVllm, why_no_adapter
from student_trainer.rollouts.samplers.vllm_sampler import VllmSampler
from student_trainer.rollouts.samplers.vllm_transfer import BUFFER_BYTES, VllmTransfer
from student_trainer.rollouts.weight_folder import WeightFolder
from student_trainer.rollouts.weight_sync import WeightSync
from tests.cores import own_core
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import EOS_ID, VOCAB_SIZE, tiny_student, write_tiny_student
from tests.trainer.rollouts.swaps_in_flight import newest_version

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM leaves its ZeroMQ context to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]

CLOSE = 1e-4
ALONE = WeightFormat(dtype="float32", adapter_alone=True)
PROMPTS = [np.array([5, 6, 7, 8], np.int32), np.array([9, 3], np.int32)]
LONG = np.resize(np.arange(EOS_ID + 1, VOCAB_SIZE, dtype=np.int32), CACHE_BLOCK + 30)


@dataclass(frozen=True, slots=True)
class Student:
    """A learner with an adapter, whose matrices a test may change."""

    model: PreTrainedModel
    adapter: Adapter
    learner: Learner

    def move(self, seed: int) -> None:
        """As an update does, and far."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.adapter.parameters():
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def student() -> Student:
    model = tiny_student()
    shape = LoraShape(rank=4, alpha=8.0, targets=ALL_LINEAR, rslora=True)
    adapter = adapted(model, new_config(shape, "base"))
    return Student(model, adapter, learner_of(model, adapter=adapter))


@pytest.fixture(scope="module")
async def sampler(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmSampler]:
    folder = tmp_path_factory.mktemp("vllm")
    config = new_config(LoraShape(rank=4, alpha=8.0, targets=ALL_LINEAR, rslora=True), "base")
    made = VllmSampler(
        model=str(write_tiny_student(folder / "student")),
        dtype="float32",
        max_context=256,
        max_num_topk=0,
        max_num_seqs=8,
        stream_interval=4,
        kv_cache_gib=0.5,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        cpu_cores=own_core(),
        seed=0,
        passage=WeightFolder(
            folder, file=ADAPTER_FILE, beside={CONFIG_FILE: written_config(config)}
        ),
        adapter=AdapterInVllm(rank=4),
    )
    made.make_room(1 << 20, print)
    await made.start()
    yield made
    await made.close()
    gc.collect()


async def continued(
    sampler: VllmSampler, name: str, prompt: NDArray[np.int32], num_tokens: int = 12, seed: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    options = SamplingOptions(max_tokens=num_tokens, temperature=1.0, seed=seed)
    parts = [delta async for delta in sampler.generate(name, prompt, options)]
    return (
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
    )


async def gap(
    sampler: VllmSampler, learner: Learner, name: str, prompt: NDArray[np.int32]
) -> float:
    tokens, logprobs = await continued(sampler, name, prompt)
    return float(np.abs(learner.logprobs(prompt, tokens) - logprobs).max())


async def test_the_proof_before_the_first_rollout_holds(
    sampler: VllmSampler, student: Student
) -> None:
    sync = WeightSync(
        student.learner, sampler, probe_prompts=PROMPTS, max_logprob_gap=1e-3, written=ALONE
    )
    prompts = probe_prompts(PROMPTS, max_context=256, sliding_window=None)
    gaps = await sync.prove(0, Proof(prompts=prompts, is_fresh=True, is_as_loaded=True))
    assert max(value for value in gaps.figures().values() if value is not None) < CLOSE
    student.move(1)
    assert await sync.push(1) < CLOSE


async def test_a_cached_prompt_is_computed_anew_with_every_adapter(
    sampler: VllmSampler, student: Student
) -> None:
    """One longer than a block of the cache, asked before: vLLM knows cached tokens by the adapter's
    name, which stays."""
    for seed in range(3):
        student.move(seed)
        await sampler.load_weights(student.learner.weights(ALONE))
        assert await gap(sampler, student.learner, f"cached-{seed}", LONG) < CLOSE
        assert await gap(sampler, student.learner, f"again-{seed}", LONG) < CLOSE


async def test_what_is_under_way_goes_on_with_the_new_adapter(
    sampler: VllmSampler, student: Student
) -> None:
    """No token is lost or said twice, and each is of the adapter that it was sampled with."""
    student.move(0)
    await sampler.load_weights(student.learner.weights(ALONE))
    options, begun = SamplingOptions(max_tokens=120, temperature=1.0, seed=0), asyncio.Event()

    async def generated(index: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        parts = []
        async for delta in sampler.generate(f"swap-{index}", PROMPTS[0], options):
            parts.append(delta)
            if sum(map(len, parts)) >= 16:
                begun.set()
        return (
            np.concatenate([part.token_ids for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
        )

    rollouts = [asyncio.create_task(generated(index)) for index in range(10)]
    await begun.wait()
    student.move(1)
    await sampler.load_weights(student.learner.weights(ALONE))
    said = await asyncio.gather(*rollouts)
    newest = set()
    for tokens, logprobs in said:
        versions = []
        for seed in (0, 1):
            student.move(seed)
            versions.append(student.learner.logprobs(PROMPTS[0], tokens))
        newest.add(newest_version(versions, logprobs, CLOSE))
    assert 1 in newest


async def test_an_adapter_that_was_saved_is_one_that_vllm_serves(
    sampler: VllmSampler, student: Student, tmp_path: Path
) -> None:
    """Read from its folder, by another id, as `vllm serve --enable-lora` does."""
    from vllm.lora.request import LoRARequest

    student.move(7)
    student.learner.save(tmp_path)
    served = LoRARequest(lora_name="served", lora_int_id=2, lora_path=str(tmp_path))
    before, sampler._adapted_by = sampler._adapted_by, served
    try:
        assert await gap(sampler, student.learner, "served", PROMPTS[0]) < CLOSE
    finally:
        sampler._adapted_by = before


def unknown_layer(
    weights: Iterator[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name.replace("q_proj", "x_proj"), tensor) for name, tensor in weights)


async def test_what_vllm_cannot_load_is_a_typed_error_and_the_engine_goes_on(
    sampler: VllmSampler, student: Student
) -> None:
    student.move(2)
    with pytest.raises(
        WeightSyncError, match=r'vLLM cannot load the learner.s adapter: .*"merged"'
    ):
        await sampler.load_weights(unknown_layer(student.learner.weights(ALONE)))
    await sampler.load_weights(student.learner.weights(ALONE))
    assert await gap(sampler, student.learner, "after", PROMPTS[0]) < CLOSE


async def test_what_vllm_takes_is_known_before_it_starts() -> None:
    assert why_no_adapter(["Qwen3ForCausalLM"], 16) is None
    assert why_no_adapter(["AModelOfTomorrow"], 16) is None
    assert why_no_adapter(["Qwen3ForCausalLM"], 513) == (
        "vLLM takes adapters up to rank 512, and this one has 513"
    )
    assert why_no_adapter(["GPT2LMHeadModel"], 16) == "vLLM's GPT2LMHeadModel takes no adapters"


async def test_the_engine_has_room_for_the_rank() -> None:
    assert AdapterInVllm(rank=9).engine_args()["max_lora_rank"] == 16
    assert AdapterInVllm(rank=64).engine_args()["max_lora_rank"] == 64


# Here because vLLM is there.
async def test_the_two_ends_agree_on_a_buffer_that_holds_the_largest_tensor() -> None:
    """IPC refuses a tensor that is larger, and a head may be."""
    norm = WrittenTensor("norm.weight", "float32", (4,), 16)
    head = WrittenTensor("lm_head.weight", "bfloat16", (151_936, 4096), 151_936 * 4096 * 2)
    ipc: Any = VllmTransfer(backend="ipc", device=torch.device("cpu")).init_info([norm, head], 1)
    assert (ipc.rank, ipc.packed, ipc.packed_buffer_size_bytes) == (0, True, head.num_bytes)
    nccl: Any = VllmTransfer(backend="nccl", device=torch.device("cpu")).init_info([norm], 2)
    assert (nccl.rank, nccl.world_size, nccl.packed) == (0, 3, True)
    assert nccl.packed_buffer_size_bytes == BUFFER_BYTES
    assert (nccl.master_address, nccl.master_port > 0) == ("127.0.0.1", True)
