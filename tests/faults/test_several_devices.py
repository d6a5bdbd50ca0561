"""vLLM's engines over two processes: the same rows, weights in every part, and no process left.

On a CPU each process has a core. Run: FAULT_ROUNDS=long pytest tests/faults/test_several_devices.py
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedModel

from student_trainer.assembly.run import assembled
from student_trainer.errors import SamplerDiedError, WeightSyncError
from student_trainer.learner.adapter import (
    ADAPTER_FILE,
    ALL_LINEAR,
    CONFIG_FILE,
    LoraShape,
    adapted,
    new_config,
    written_config,
)
from student_trainer.learner.learner import Learner
from student_trainer.records import SamplingOptions, WeightFormat
from student_trainer.rollouts.probe import Proof, probe_prompts
from student_trainer.rollouts.samplers.vllm_adapter import AdapterInVllm
from student_trainer.rollouts.samplers.vllm_sampler import VllmSampler
from student_trainer.rollouts.stream import RolloutStream
from student_trainer.rollouts.weight_folder import WeightFolder
from student_trainer.rollouts.weight_sync import WeightSync
from student_trainer.train import train
from teacher_server.engine.base import ScoreQuery
from teacher_server.engine.hf_engine import HfEngine
from teacher_server.engine.vllm_engine import VllmEngine
from teacher_wire.id_ranges import inside
from tests.faults.engine_processes import descendants, engines, is_gone
from tests.faults.live_server import LiveServer
from tests.rounds import in_the_long_round
from tests.teacher.engine.engine_models import write_tiny_model
from tests.teacher.engine.engine_queries import a_query, assert_same_rows, grow
from tests.tracked_files import ROOT
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import VOCAB_SIZE, tiny_student, write_tiny_student
from tests.trainer.rollouts.swaps_in_flight import tied_mixture as mixture
from tests.trainer.test_train import InMemoryClient, configured, connect_to, folder, records
from tests.waiting import wait_until

__all__ = ["folder"]

HERE = sorted(os.sched_getaffinity(0))
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.vllm,
    in_the_long_round,
    pytest.mark.skipif(len(HERE) < 2, reason="needs a core for each of two processes"),
    # vLLM leaves its ZeroMQ context to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]
TWO_CORES = f"{HERE[0]},{HERE[-1]}"
PLAYGROUND = ROOT / "examples" / "playground" / "checkpoints" / "teacher"
SAME = 1e-5
"""Nats. The same float32 products, summed in two halves."""
CLOSE = 1e-4
ENTRIES = 515
"""Of the teacher's vocabulary: vLLM pads it to 576 and cuts at 288, so that the second part is
padded by a fifth."""
PROMPTS = [np.array([5, 6, 7, 8], np.int32), np.array([9, 3], np.int32)]
SAVED, ALONE = WeightFormat(as_saved=True), WeightFormat(dtype="float32", adapter_alone=True)


@asynccontextmanager
async def teacher(model: Path, **settings: Any) -> AsyncIterator[VllmEngine]:
    """Small, on a core unless it is told otherwise; no process of it is left behind."""
    small = {"block_size": 32, "kv_cache_gib": 0.05, "enforce_eager": True}
    settings = {"cpu_cores": str(HERE[0])} | small | settings
    engine = VllmEngine(
        model=str(model),
        max_context=1024,
        max_num_batched_tokens=256,
        **settings,
    )
    before = shared_memory()
    await engine.start()
    assert shared_memory() == before
    processes = engine_processes(os.getpid())
    try:
        yield engine
    finally:
        await engine.close()
        gc.collect()
    wait_until(lambda: all(map(is_gone, processes)))


def engine_processes(pid: int) -> list[Path]:
    """Those below one, but for multiprocessing's own, which stays."""
    return [
        process
        for process in descendants(pid)
        if b"resource_tracker" not in (process / "cmdline").read_bytes()
    ]


def shared_memory() -> set[str]:
    """Names of what vLLM's workers have between them, by which it would outlive them."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("vllm_dist_")}


def over_all_ids(seed: int, num_tokens: int, first_row: int, **options: Any) -> ScoreQuery:
    """With targets and candidates in both parts of the vocabulary, up to its last entry."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, ENTRIES, num_tokens, dtype=np.int32)
    ids[-3:] = ENTRIES - 1, 287, 288
    candidates = rng.integers(1, ENTRIES, (num_tokens - first_row, 4), dtype=np.int32)
    for array in (ids, candidates):
        array[inside(options.get("excluded_ids", ()), array)] = 7
    return replace(a_query(ids, first_row), candidate_ids=candidates, **options)


def queries() -> list[ScoreQuery]:
    """Short, longer than a step, at another temperature, and without ids of both parts."""
    return [
        over_all_ids(0, 60, 1),
        over_all_ids(1, 900, 500, temperature=0.7),
        over_all_ids(2, 200, 30, k=128),
        over_all_ids(3, 50, 5, excluded_ids=((100, 140), (400, 430))),
    ]


@pytest.mark.parametrize("parallel", ["tensor", "pipeline", "data"])
async def test_a_teacher_over_two_processes_says_what_one_says(
    parallel: str, tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "model", seed=1, vocab_size=ENTRIES)
    reference = HfEngine(model=str(model), max_context=1024, device="cpu", max_sessions=4)
    await reference.start()
    asked = queries()
    ids = over_all_ids(4, 700, 1).token_ids
    bounds = [30, 96, 97, 300, 301, 320, 700]
    # On a CPU stages need a compiled engine, whose rounding is another one.
    eager = parallel != "pipeline"
    async with teacher(model, enforce_eager=eager) as alone:
        expected = [await alone.score(query) for query in asked]
        in_pieces = await grow(alone, ids, bounds, session="s")
    for rows, query in zip(expected, asked, strict=True):
        assert_same_rows(rows, await reference.score(query))
    two: dict[str, Any] = {f"{parallel}_parallel_size": 2, "cpu_cores": TWO_CORES}
    async with teacher(model, enforce_eager=eager, **two) as engine:
        for rows, query in zip(expected, asked, strict=True):
            assert_same_rows(await engine.score(query), rows, tolerance=SAME)
        # Beside each other, so that data parallel ones are on both copies.
        grown = await asyncio.gather(*(grow(engine, ids, bounds, session=n) for n in "abcd"))
        for rows in grown:
            assert_same_rows(rows, in_pieces, tolerance=SAME)
        assert min(rows.computed_tokens for rows in grown) <= in_pieces.computed_tokens
        if parallel == "data":
            assert engine._ranks._num_sessions == [2, 2]
            again = await grow(engine, ids, [699, 700], session="a")
            assert again.computed_tokens <= 2 * 32, "its text is in the cache of its copy"
        assert engine.kv_used_ratio() == 0.0
    await reference.close()


async def test_two_ranks_of_a_trained_model_have_the_same_top_8_in_every_row() -> None:
    """The playground's teacher cut in two: 600 rows, of texts like those it was trained on."""
    tokenizer = AutoTokenizer.from_pretrained(PLAYGROUND)
    lines = (PLAYGROUND.parent / "train.jsonl").read_text().splitlines()
    texts = [json.loads(line) for line in lines[:12]]
    joined = "".join(text["prompt"] + text["solution"] for text in texts)
    ids = np.array(tokenizer(joined[:640])["input_ids"][:601], np.int32)
    assert len(ids) == 601
    query = replace(a_query(ids, 1), k=8, candidate_ids=None)
    async with teacher(PLAYGROUND) as alone:
        expected = await alone.score(query)
    two: dict[str, Any] = {"tensor_parallel_size": 2, "cpu_cores": TWO_CORES}
    async with teacher(PLAYGROUND, **two) as engine:
        rows = await engine.score(query)
    assert rows.topk_ids.shape == (600, 8)
    same = (rows.topk_ids == expected.topk_ids).all(axis=1)
    assert same.sum() == 600, np.flatnonzero(~same)
    assert np.abs(rows.topk_logprobs - expected.topk_logprobs).max() < CLOSE


@pytest.mark.parametrize(
    ("parallel", "moment"), [("tensor", "starting"), ("tensor", "serving"), ("data", "serving")]
)
def test_no_process_outlives_a_teacher_that_is_killed(
    parallel: str, moment: str, tmp_path: Path
) -> None:
    """Neither engine cores nor workers, nor what vLLM has to balance several copies."""
    model = write_tiny_model(tmp_path / "model")
    words = f"--engine vllm --model {model} --max-context 192 --max-k 16 --kv-cache-gib 0.05"
    words += f" --enforce-eager --no-self-test --cpu-cores {TWO_CORES} --{parallel}-parallel-size 2"
    server = LiveServer(tmp_path, *words.split(), forked=False)
    try:
        if moment == "starting":
            wait_until(lambda: len(engine_processes(server.process.pid)) >= 3)
        else:
            server.wait_until_ready()
        processes = descendants(server.process.pid)
        assert len(processes) >= 3
        server.process.kill()
        wait_until(lambda: all(map(is_gone, processes)))
    finally:
        server.end()


@asynccontextmanager
async def sampler(student: Path, **other: Any) -> AsyncIterator[VllmSampler]:
    """On two cores, one for each part of the student."""
    made = VllmSampler(
        model=str(student),
        dtype="float32",
        max_context=256,
        max_num_topk=4,
        max_num_seqs=8,
        stream_interval=4,
        kv_cache_gib=0.5,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        cpu_cores=TWO_CORES,
        seed=0,
        tensor_parallel_size=2,
        **other,
    )
    made.make_room(1 << 20, print)
    before = shared_memory()
    await made.start()
    assert shared_memory() == before
    try:
        yield made
    finally:
        await made.close()
        gc.collect()


async def gap(made: VllmSampler, learner: Learner, name: str) -> float:
    """Between its log-probs and the learner's, over a rollout, nats."""
    options = SamplingOptions(max_tokens=24, temperature=1.0, seed=0)
    parts = [delta async for delta in made.generate(name, PROMPTS[0], options)]
    tokens: NDArray[np.int32] = np.concatenate([part.token_ids for part in parts])
    seen = np.concatenate([part.logprobs for part in parts])
    return float(np.abs(learner.logprobs(PROMPTS[0], tokens) - seen).max())


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """As a run saves it."""
    learner_of(model).save(folder)
    return folder


def proof() -> Proof:
    prompts = probe_prompts(PROMPTS, max_context=256, sliding_window=None)
    return Proof(prompts=prompts, is_fresh=True, is_as_loaded=True)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
async def test_weights_reach_every_part_of_a_sampler(kind: str, tmp_path: Path) -> None:
    """The mixture's head is its embedding, and its only key/value head is in both parts."""
    changed = mixture() if kind == "mixture" else tiny_student(vocab_size=VOCAB_SIZE)
    learner = learner_of(changed)
    async with sampler(saved(changed, tmp_path / "student")) as made:
        sync = WeightSync(learner, made, probe_prompts=PROMPTS, max_logprob_gap=1e-3, written=SAVED)
        gaps = await sync.prove(0, proof())
        assert max(found for found in gaps.figures().values() if found is not None) < CLOSE
        for version in range(2):
            with torch.no_grad():
                for parameter in changed.parameters():
                    parameter += 0.2 * torch.randn_like(parameter)
            assert await sync.push(version) < CLOSE
        # What is in one part alone: rows of the embedding and columns of a layer, either half.
        named = dict(changed.named_parameters())
        for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
            rows = named[name] if "embed" in name else named[name].T
            half = len(rows) // 2
            for number, part in enumerate((slice(0, half), slice(half, None))):
                with torch.no_grad():
                    rows[part] += 0.5 * torch.randn_like(rows[part])
                assert await gap(made, learner, f"{name}-{number}-before") > 10 * CLOSE
                assert await sync.push(3) < CLOSE
                assert await gap(made, learner, f"{name}-{number}-after") < CLOSE


async def test_weights_that_cannot_be_loaded_are_told_and_the_next_ones_are(
    tmp_path: Path,
) -> None:
    """A worker that fails leaves no answer behind for the next question."""
    model = tiny_student()
    learner = learner_of(model)
    async with sampler(write_tiny_student(tmp_path / "student")) as made:
        for _ in range(2):
            with pytest.raises(WeightSyncError, match=r"^vLLM cannot load .*other"):
                await made.load_weights(iter([("other.weight", torch.ones(1))]))
        await made.load_weights(learner.weights(SAVED))
        assert await gap(made, learner, "after") < CLOSE
        one_less = (pair for pair in learner.weights(SAVED) if "down_proj" not in pair[0])
        with pytest.raises(WeightSyncError, match=r"keeps 2 tensors .*down_proj"):
            await made.load_weights(one_less)


async def test_an_adapter_reaches_every_part_of_a_sampler(tmp_path: Path) -> None:
    config = new_config(LoraShape(rank=4, alpha=8.0, targets=ALL_LINEAR, rslora=True), "base")
    model = tiny_student()
    adapter = adapted(model, config)
    learner = learner_of(model, adapter=adapter)
    passage = WeightFolder(
        tmp_path, file=ADAPTER_FILE, beside={CONFIG_FILE: written_config(config)}
    )
    student = write_tiny_student(tmp_path / "student")
    async with sampler(student, passage=passage, adapter=AdapterInVllm(rank=4)) as made:
        sync = WeightSync(learner, made, probe_prompts=PROMPTS, max_logprob_gap=1e-3, written=ALONE)
        gaps = await sync.prove(0, proof())
        assert max(found for found in gaps.figures().values() if found is not None) < CLOSE
        for version in range(3):
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.copy_(0.15 * torch.randn(parameter.shape))
            assert await gap(made, learner, f"before-{version}") > 10 * CLOSE
            assert await sync.push(version) < CLOSE
        unknown = (
            (name.replace("q_proj", "x_proj"), tensor) for name, tensor in learner.weights(ALONE)
        )
        with pytest.raises(WeightSyncError, match=r'cannot load the learner.s adapter: .*"merged"'):
            await made.load_weights(unknown)
        assert await sync.push(4) < CLOSE


async def test_a_worker_that_dies_is_a_sampler_that_died(tmp_path: Path) -> None:
    async with sampler(write_tiny_student(tmp_path / "student")) as made:
        (core,) = engines(os.getpid())
        workers = engine_processes(int(core.name))
        assert len(workers) == 2

        async def generated() -> None:
            options = SamplingOptions(max_tokens=200, temperature=1.0, seed=0)
            async for _ in made.generate("long", PROMPTS[0], options):
                os.kill(int(workers[1].name), signal.SIGKILL)

        with pytest.raises(SamplerDiedError, match="vLLM's engine has died: Worker proc VllmW"):
            await generated()
    wait_until(lambda: is_gone(core))


def test_a_run_goes_on_when_a_worker_of_its_sampler_dies(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    connect_to(InMemoryClient(), monkeypatch)
    settings = {"kind": "vllm", "tensor_parallel_size": 2, "cpu_cores": TWO_CORES}
    config = configured(folder, f"sampler={json.dumps(settings)}", "data.heldout=null")
    take, calls = RolloutStream.take, 0

    def killing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            (core,) = engines(os.getpid())
            os.kill(int(engine_processes(int(core.name))[0].name), signal.SIGKILL)
        return take(*arguments, **named)

    monkeypatch.setattr(RolloutStream, "take", killing)
    with assembled(config) as run:
        train(run)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("vLLM's engine has died: ") == said.count("Another one is started") == 1
    steps = records(config, "step")
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(step["sync_gap_nats"] < CLOSE for step in steps)
