"""The vLLM sampler against transformers.

Run: python -m pytest -m vllm tests/trainer/rollouts/test_samplers.py

One engine for the module. Tolerance 1e-4 nats: float32 on both sides, other kernels; log-probs are
of order 10. The engine's batch and its deltas are whatever the machine's speed makes of them.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import PreTrainedModel

from student_trainer.errors import SamplerDiedError, SamplerError, WeightSyncError
from student_trainer.pretrained import load_student, tensor_names
from student_trainer.records import Announced, Delta, Finish, Prompt, SamplingOptions, WeightFormat
from student_trainer.rollouts.generation import Generation
from student_trainer.rollouts.probe import Proof, probe_prompts
from student_trainer.rollouts.samplers import vllm_deltas, vllm_transfer
from student_trainer.rollouts.samplers import vllm_sampler as vllm_sampler_module
from student_trainer.rollouts.samplers.base import Weights
from student_trainer.rollouts.samplers.vllm_sampler import VllmSampler
from student_trainer.rollouts.weight_folder import WeightFolder
from student_trainer.rollouts.weight_sync import WeightSync
from teacher_wire.id_ranges import inside
from tests.cores import own_core
from tests.faults.engine_processes import engines
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import EOS_ID, VOCAB_SIZE
from tests.trainer.rollouts.cpu_transfer import EXTENSION, CpuTransfer, no_gpu
from tests.trainer.rollouts.swaps_in_flight import changed_copy, newest_version, tied_mixture

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM leaves its ZeroMQ context to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]

PROMPT = np.array([5, 6, 7, 8], np.int32)
NUM_TOPK = 4
CLOSE = 1e-4
AS_SENT = WeightFormat(as_saved=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a run saves it."""
    folder = tmp_path_factory.mktemp("student")
    learner_of(tied_mixture()).save(folder)
    return folder


@pytest.fixture(scope="module")
def learner() -> PreTrainedModel:
    """The weights that the sampler holds."""
    return tied_mixture()


def vllm_sampler(checkpoint: Path, max_context: int = 256, **other: Any) -> VllmSampler:
    """Small, on one core."""
    return VllmSampler(
        model=str(checkpoint),
        dtype="float32",
        max_context=max_context,
        max_num_topk=NUM_TOPK,
        max_num_seqs=16,
        stream_interval=4,
        kv_cache_gib=1.0,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        cpu_cores=own_core(),
        seed=0,
        **other,
    )


@pytest.fixture(scope="module")
async def sampler(checkpoint: Path) -> AsyncIterator[VllmSampler]:
    # vLLM's weight transfer is one more way into it.
    transfer = CpuTransfer(backend="ipc", device=torch.device("cpu"))
    made = vllm_sampler(checkpoint, transfer=transfer, worker_extension=EXTENSION)
    await made.start()
    made.transfer = None
    yield made
    await made.close()
    gc.collect()


async def deltas(
    sampler: VllmSampler, name: str, options: SamplingOptions, *, pause_s: float = 0.0
) -> list[Delta]:
    """All of one generation, taken by a consumer that pauses after each delta."""
    parts = []
    async for delta in sampler.generate(name, PROMPT, options):
        parts.append(delta)
        await asyncio.sleep(pause_s)
    return parts


def joined(parts: list[Delta], name: str) -> NDArray[np.generic]:
    return np.concatenate([getattr(part, name) for part in parts])


def expected_logprobs(
    model: PreTrainedModel, token_ids: NDArray[np.generic], temperature: float
) -> torch.Tensor:
    """[n, V] of the whole sequence at once."""
    sequence = torch.from_numpy(np.concatenate([PROMPT, token_ids])).long()[None]
    with torch.no_grad():
        logits = model(sequence).logits[0, len(PROMPT) - 1 : -1].float()
    return torch.log_softmax(logits / temperature, -1)


def check_rows(model: PreTrainedModel, parts: list[Delta], temperature: float) -> None:
    """Log-probs of tokens and top-k equal transformers'."""
    tokens = joined(parts, "token_ids")
    expected = expected_logprobs(model, tokens, temperature)
    own = expected[torch.arange(len(tokens)), torch.from_numpy(tokens).long()].numpy()
    assert np.abs(joined(parts, "logprobs") - own).max() < CLOSE
    topk_ids, topk = joined(parts, "topk_ids"), joined(parts, "topk_logprobs")
    assert topk_ids.shape == (len(tokens), NUM_TOPK)
    assert np.abs(topk - expected.topk(NUM_TOPK).values.numpy()).max() < CLOSE
    at_ids = expected.gather(1, torch.from_numpy(topk_ids).long()).numpy()
    assert np.abs(topk - at_ids).max() < CLOSE
    assert all(len(set(row)) == NUM_TOPK for row in topk_ids.tolist())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_log_probs_and_topk_equal_transformers(
    sampler: VllmSampler, learner: PreTrainedModel, temperature: float
) -> None:
    options = SamplingOptions(max_tokens=40, temperature=temperature, num_topk=NUM_TOPK, seed=11)
    parts = await deltas(sampler, f"rows-{temperature}", options)
    assert sum(map(len, parts)) > 10
    assert [part.finish is None for part in parts] == [True] * (len(parts) - 1) + [False]
    check_rows(learner, parts, temperature)


async def test_top_p_log_probs_are_those_of_the_nucleus(
    sampler: VllmSampler, learner: PreTrainedModel
) -> None:
    options = SamplingOptions(max_tokens=30, top_p=0.8, seed=2)
    parts = await deltas(sampler, "nucleus", options)
    tokens = joined(parts, "token_ids")
    full = expected_logprobs(learner, tokens, 1.0)
    for row, token, got in zip(full, tokens, joined(parts, "logprobs"), strict=True):
        ordered = row.exp().sort(descending=True).values
        inside = ordered[(ordered.cumsum(0) - ordered) < 0.8]
        assert abs(float(row[int(token)] - inside.sum().log()) - float(got)) < CLOSE


@pytest.mark.parametrize("temperature", [1.0, 0.0])
async def test_ids_that_take_no_part_are_never_said(
    sampler: VllmSampler, temperature: float
) -> None:
    """Neither sampled nor greedy, and the log-probs are the learner's; others beside it may."""
    excluded = ((2, 7), (20, 21), (40, 60))
    options = SamplingOptions(
        max_tokens=60, temperature=temperature, num_topk=NUM_TOPK, seed=4, excluded_ids=excluded
    )
    parts, beside = await asyncio.gather(
        deltas(sampler, f"without-{temperature}", options),
        deltas(sampler, f"with-{temperature}", replace(options, excluded_ids=())),
    )
    tokens = joined(parts, "token_ids").astype(np.int32)
    assert not inside(excluded, tokens).any()
    assert not inside(excluded, joined(parts, "topk_ids").astype(np.int32)).any()
    assert inside(excluded, joined(beside, "topk_ids").astype(np.int32)).any()
    learner = learner_of(tied_mixture(), excluded_ids=excluded)
    own = learner.logprobs(PROMPT, tokens)
    assert np.abs(joined(parts, "logprobs") - own).max() < CLOSE


async def test_more_ids_than_vllm_leaves_out_are_refused(
    sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SamplingOptions(max_tokens=4, seed=4, excluded_ids=((20, 30),))
    assert len(await deltas(sampler, "few", options)) > 0
    monkeypatch.setattr(vllm_sampler_module, "MAX_BIASED_IDS_V2", 9)
    first_runner = await deltas(sampler, "first runner", options)
    assert len(first_runner) > 0
    config = type(sampler._running().vllm_config)
    monkeypatch.setattr(config, "use_v2_model_runner", True)
    with pytest.raises(SamplerError, match=r"10 ids take no part.*at most 9"):
        await deltas(sampler, "second runner", options)


async def test_merged_deltas_give_the_same_rows_as_prompt_ones(
    sampler: VllmSampler, learner: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ragged: list[int] = []
    merged_rows = vllm_deltas.merged_rows

    def counted(flat, num_tokens, width):  # type: ignore[no-untyped-def]
        ragged.append(num_tokens)
        return merged_rows(flat, num_tokens, width)

    monkeypatch.setattr(vllm_deltas, "merged_rows", counted)
    options = SamplingOptions(max_tokens=120, num_topk=NUM_TOPK, seed=5)
    prompt = await deltas(sampler, "prompt", options)
    slow = await deltas(sampler, "slow", options, pause_s=0.3)
    assert len(slow) < len(prompt)
    assert ragged
    for name in ("token_ids", "topk_ids"):
        assert np.array_equal(joined(slow, name), joined(prompt, name))
    for name in ("logprobs", "topk_logprobs"):
        assert np.abs(joined(slow, name) - joined(prompt, name)).max() < CLOSE
    check_rows(learner, slow, 1.0)


async def test_a_response_ends_at_a_stop_token_of_the_run(
    sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SamplingOptions(max_tokens=60, num_topk=NUM_TOPK, seed=8)
    whole = joined(await deltas(sampler, "whole", options), "token_ids").tolist()
    stop_id = whole[len(whole) // 2]
    # An id beyond the model's vocabulary can never be said, and is no error.
    monkeypatch.setattr(sampler, "stop_ids", (stop_id, 10**6))
    parts = await deltas(sampler, "stopped", options)
    assert joined(parts, "token_ids").tolist() == whole[: whole.index(stop_id) + 1]
    assert parts[-1].finish is Finish.STOP


async def test_an_idle_loop_of_the_engine_takes_no_core_from_a_thread_that_computes(
    sampler: VllmSampler,
) -> None:
    threads = [thread for core in engines(os.getpid()) for thread in (core / "task").iterdir()]
    loops = [t for t in threads if (t / "comm").read_text().startswith("gloo_tcp_loop")]
    assert loops
    for thread in threads:
        policy = os.sched_getscheduler(int(thread.name))
        assert policy == (os.SCHED_BATCH if thread in loops else os.SCHED_OTHER)


async def test_generation_without_topk_still_has_log_probs(sampler: VllmSampler) -> None:
    parts = await deltas(sampler, "bare", SamplingOptions(max_tokens=9, seed=1))
    assert joined(parts, "topk_ids").shape == (len(joined(parts, "token_ids")), 0)
    assert (joined(parts, "logprobs") < 0).all()


async def test_generation_is_reproducible_by_seed(sampler: VllmSampler) -> None:
    async def tokens(name: str, seed: int) -> list[int]:
        options = SamplingOptions(max_tokens=24, seed=seed)
        return joined(await deltas(sampler, name, options), "token_ids").tolist()

    alone = await tokens("seed-a", 3)
    beside = await asyncio.gather(*(tokens(f"seed-b{seed}", seed) for seed in range(6)))
    assert beside[3] == alone
    assert len({tuple(response) for response in beside}) == 6


async def test_more_seeded_prompts_than_fit_a_step_are_generated(sampler: VllmSampler) -> None:
    """4,000 prompt tokens at once, where vLLM takes 2,048 a step."""
    rng = np.random.default_rng(0)
    options = SamplingOptions(max_tokens=2, seed=1)

    async def num_tokens(index: int) -> int:
        prompt = rng.integers(EOS_ID + 1, VOCAB_SIZE, 250, dtype=np.int32)
        parts = [d async for d in sampler.generate(f"long-{index}", prompt, options)]
        assert parts[-1].finish in (Finish.LENGTH, Finish.STOP)
        return sum(map(len, parts))

    lengths = await asyncio.gather(*(num_tokens(index) for index in range(16)))
    assert set(lengths) <= {1, 2}


async def test_abort_ends_soon_and_keeps_the_tokens_so_far(
    sampler: VllmSampler, learner: PreTrainedModel
) -> None:
    options = SamplingOptions(max_tokens=240, num_topk=NUM_TOPK, seed=5)
    parts: list[Delta] = []
    async for delta in sampler.generate("abort", PROMPT, options):
        parts.append(delta)
        if len(parts) == 1:
            await sampler.abort(["abort"])
    tokens = joined(parts, "token_ids")
    assert len(parts[0]) <= len(tokens) < 240
    assert parts[-1].finish is Finish.TRUNCATED
    check_rows(learner, parts, 1.0)


async def test_abort_of_an_unknown_id_is_ignored(sampler: VllmSampler) -> None:
    await sampler.abort(["never heard of"])
    assert len(await deltas(sampler, "never heard of", SamplingOptions(max_tokens=4, seed=1))) >= 1


async def test_budget_and_end_token_end_a_generation(sampler: VllmSampler) -> None:
    finishes = set()
    for seed in range(12):
        options = SamplingOptions(max_tokens=30, temperature=2.0, seed=seed)
        parts = await deltas(sampler, f"end-{seed}", options)
        tokens = joined(parts, "token_ids").tolist()
        finishes.add(parts[-1].finish)
        if parts[-1].finish is Finish.STOP:
            assert tokens.index(EOS_ID) == len(tokens) - 1
        else:
            assert EOS_ID not in tokens
            assert len(tokens) == 30
    assert finishes == {Finish.STOP, Finish.LENGTH}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU compiled sampling is worth it")
async def test_an_eager_engine_compiles_nothing(sampler: VllmSampler) -> None:
    """Neither the model nor, once more for each shape of a batch, the counting of ranks."""
    (engine,) = engines(os.getpid())
    assert b"TORCH_COMPILE_DISABLE=1" in (engine / "environ").read_bytes().split(b"\0")


async def test_what_vllm_refuses_before_it_starts_is_a_sampler_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        refused = vllm_sampler(checkpoint, max_context=100_000)
        with pytest.raises(SamplerError) as caught:
            await refused.start()
        await refused.close()
        assert not list(Path(folder).glob("driftline-sampler-*"))
    line = str(caught.value)
    assert line.startswith(f"vLLM cannot generate with {checkpoint}: ")
    assert "max_model_len" in line
    assert "errors.pydantic.dev" not in line


async def test_a_second_answer_follows_the_first_and_what_was_said_between(
    sampler: VllmSampler, learner: PreTrainedModel
) -> None:
    turn = np.array([EOS_ID, 9, 12, 9], np.int32)
    asked = Prompt(prompt_id="", text="", token_ids=PROMPT, answer=None, turns=(turn,))
    for seed in range(20):
        options = SamplingOptions(max_tokens=60, temperature=2.0, num_topk=NUM_TOPK, seed=seed)
        generation = Generation(asked, request_id=f"s{seed}", options=options, sampler=sampler)
        await generation.run()
        growing = generation.growing
        end = growing.num_tokens
        if (sampled := growing.sampled[:end]).all():
            continue  # the first answer did not end in time
        ids = growing.token_ids[:end]
        expected = expected_logprobs(learner, ids, 2.0)
        own = expected[torch.arange(end), torch.from_numpy(ids).long()].numpy()
        assert np.abs(growing.logprobs[:end] - own)[sampled].max() < CLOSE
        assert (~sampled).sum() == len(turn) - 1
        assert sampled[-1]
        break
    else:
        pytest.fail("no first answer ended")


async def test_every_finish_reason_of_vllm_is_known_or_a_typed_error() -> None:
    from vllm.v1.engine import FINISH_REASON_STRINGS

    known = {"stop": Finish.STOP, "length": Finish.LENGTH, "abort": Finish.TRUNCATED}
    for reason in (*FINISH_REASON_STRINGS, "a reason of tomorrow"):
        if reason in known:
            assert vllm_deltas.finish_of("r", reason) is known[reason]
        else:
            with pytest.raises(SamplerError, match=rf"the generation r with the reason '{reason}'"):
                vllm_deltas.finish_of("r", reason)
    assert vllm_deltas.finish_of("r", None) is None


async def test_a_loop_that_vllm_ends_by_itself_is_a_typed_error(
    sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its detection of repetition, which only a request that asks for it has."""
    from vllm.sampling_params import RepetitionDetectionParams, SamplingParams

    detection = RepetitionDetectionParams(max_pattern_size=1, min_pattern_size=1, min_count=2)
    asking = partial(SamplingParams, repetition_detection=detection, ignore_eos=True)
    monkeypatch.setattr("vllm.SamplingParams", asking)
    # Of 240 draws from some 20 likely ids two in a row are the same.
    with pytest.raises(SamplerError, match="the generation loop with the reason 'repetition'"):
        await deltas(sampler, "loop", SamplingOptions(max_tokens=240, seed=1))


async def test_what_is_under_way_goes_on_with_new_weights(
    sampler: VllmSampler, learner: PreTrainedModel
) -> None:
    """Twice, with more rollouts than the engine takes at once: no token is lost or said twice."""
    options = SamplingOptions(max_tokens=200, num_topk=NUM_TOPK)
    versions, begun = [learner], asyncio.Event()

    async def generated(index: int) -> list[Delta]:
        parts = []
        seeded = replace(options, seed=index)
        async for delta in sampler.generate(f"swap-{index}", PROMPT, seeded):
            parts.append(delta)
            if sum(map(len, parts)) >= 24 * len(versions):
                begun.set()
        return parts

    rollouts = [asyncio.create_task(generated(index)) for index in range(20)]
    for _ in range(2):
        await begun.wait()
        begun.clear()
        changed = changed_copy(versions[-1], 0.1)
        await sampler.load_weights(learner_of(changed).weights(AS_SENT))
        versions.append(changed)
    mixed = 0
    for parts in await asyncio.gather(*rollouts):
        tokens, seen = joined(parts, "token_ids"), joined(parts, "logprobs")
        assert parts[-1].finish in (Finish.LENGTH, Finish.STOP)
        assert len(tokens) == 200 or parts[-1].finish is Finish.STOP
        position = torch.arange(len(tokens))
        ids = torch.from_numpy(tokens).long()
        own = [expected_logprobs(model, tokens, 1.0)[position, ids].numpy() for model in versions]
        mixed += newest_version(own, seen, CLOSE) > 0
    assert mixed >= 10
    await sampler.load_weights(learner_of(learner).weights(AS_SENT))
    check_rows(learner, await deltas(sampler, "back", replace(options, max_tokens=20)), 1.0)


@pytest.mark.parametrize("backend", ["ipc", "nccl"])
async def test_weights_come_by_vllms_own_transfer(
    sampler: VllmSampler,
    learner: PreTrainedModel,
    backend: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All but the transport: under a rollout, to an engine that sleeps, in several pieces."""
    way = CpuTransfer(backend=backend, device=torch.device("cpu"))
    monkeypatch.setattr(sampler, "transfer", way)
    monkeypatch.setattr(sampler, "sleep_level", 1)
    monkeypatch.setattr(vllm_transfer, "BUFFER_BYTES", 1 << 14)
    options = SamplingOptions(max_tokens=200, num_topk=NUM_TOPK, seed=1)
    written = replace(AS_SENT, is_announced=True)
    changed = changed_copy(learner, 0.2)
    sync = WeightSync(
        learner_of(changed),
        sampler,
        probe_prompts=[PROMPT],
        max_logprob_gap=CLOSE,
        written=written,
    )
    with no_gpu(monkeypatch, tmp_path):
        rollout = sampler.generate(f"goes on {backend}", PROMPT, options)
        begun = await anext(rollout)
        assert await sync.push(1) < CLOSE
        rest = [delta async for delta in rollout]
        assert len(begun) + sum(map(len, rest)) == 200 or rest[-1].finish is Finish.STOP

        await sampler.sleep()
        with pytest.raises(RuntimeError, match="asked while it sleeps"):
            await deltas(sampler, "asleep", options)
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        assert await sync.push(2) < CLOSE
        check_rows(changed, await deltas(sampler, f"by {backend}", options), 1.0)

        sent = learner_of(learner).weights(written)
        assert isinstance(sent, Announced)
        one_less = [tensor for tensor in sent.tensors if tensor.name != "model.norm.weight"]
        kept = ((name, tensor) for name, tensor in sent if name != "model.norm.weight")
        with pytest.raises(WeightSyncError, match=r"keeps 1 tensors .* no model\.norm\.weight"):
            await sampler.load_weights(Announced(kept, one_less))
        way.close()
    monkeypatch.undo()
    await sampler.load_weights(learner_of(learner).weights(AS_SENT))
    check_rows(learner, await deltas(sampler, f"after {backend}", options), 1.0)


# Before last: it leaves other weights behind.
async def test_changed_weights_arrive_exactly_and_other_ones_are_noticed(
    sampler: VllmSampler, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = load_student(str(checkpoint), dtype=torch.float32, device=torch.device("cpu"))
    learner, probes = learner_of(changed), [PROMPT, PROMPT[:1]]
    sync = WeightSync(learner, sampler, probe_prompts=probes, max_logprob_gap=1e-3, written=AS_SENT)
    proof = Proof(
        prompts=probe_prompts([PROMPT], max_context=256, sliding_window=None),
        is_fresh=True,
        is_as_loaded=True,
        checkpoint_names=tensor_names(str(checkpoint)),
    )
    gaps = await sync.prove(0, proof)
    assert all(gap is not None and gap < CLOSE for gap in gaps.figures().values())
    for version in range(3):
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        assert await sync.push(version) < CLOSE
    options = SamplingOptions(max_tokens=20, num_topk=NUM_TOPK, seed=1)
    check_rows(changed, await deltas(sampler, "after", options), 1.0)

    # Through a file they are the very same.
    folder = WeightFolder(tmp_path)
    monkeypatch.setattr(sampler, "passage", folder)
    folder.make_room(learner.export_bytes(AS_SENT), print)
    await sampler.load_weights(learner.weights(AS_SENT))
    check_rows(changed, await deltas(sampler, "by a file", options), 1.0)
    folder.close()
    monkeypatch.undo()

    given = dict(learner.weights(AS_SENT))
    # The tied head, which vLLM on a CPU keeps a packed copy of, comes with the embedding.
    assert "lm_head.weight" not in given
    del given["model.norm.weight"]
    with pytest.raises(WeightSyncError, match=r"vLLM keeps 1 tensors .* no model\.norm\.weight"):
        await sampler.load_weights(iter(given.items()))

    # From here on the engine is made to load the weights it began with.
    async def load_others(weights: Weights) -> None:
        await load_weights(iter(load_file(checkpoint / "model.safetensors").items()))

    load_weights = sampler.load_weights
    monkeypatch.setattr(sampler, "load_weights", load_others)
    with pytest.raises(WeightSyncError, match="nats, more than"):
        await sync.push(7)


# Last: it ends the engine.
async def test_an_engine_that_dies_under_a_generation_and_a_sync_is_named(
    sampler: VllmSampler, learner: PreTrainedModel
) -> None:
    options = SamplingOptions(max_tokens=240, num_topk=NUM_TOPK, seed=5)
    (engine,) = engines(os.getpid())
    generation = sampler.generate("dies", PROMPT, options)
    await anext(generation)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in learner_of(learner).weights(AS_SENT):
            if name == "model.norm.weight":
                os.kill(int(engine.name), signal.SIGKILL)
            yield name, tensor

    with pytest.raises(SamplerDiedError, match="vLLM's engine has died"):
        await sampler.load_weights(weights())
    with pytest.raises(SamplerDiedError, match="vLLM's engine has died"):
        [_ async for _ in generation]
    with pytest.raises(SamplerDiedError, match="vLLM's engine has died"):
        await deltas(sampler, "after its end", options)
