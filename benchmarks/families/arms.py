"""What is measured of a family: each a small random model against plain `model(ids).logits`.

Plain is eager attention, float32, evaluation mode, by the code of transformers alone. Texts are
longer than a sliding window and than a block of the cache, and read in pieces.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from student_trainer.errors import TrainerError, one_line
from student_trainer.learner.families import plain_logits
from student_trainer.learner.learner import Learner
from student_trainer.learner.student import student_forward
from student_trainer.pretrained import load_student, tensor_names
from student_trainer.records import Delta, SamplingOptions, WeightFormat
from student_trainer.rollouts.probe import Proof, probe_prompts
from student_trainer.rollouts.samplers.base import Sampler
from student_trainer.rollouts.samplers.hf_batched_sampler import HfBatchedSampler
from student_trainer.rollouts.samplers.hf_sampler import HfSampler
from student_trainer.rollouts.samplers.vllm_sampler import VllmSampler
from student_trainer.rollouts.weight_sync import WeightSync
from teacher_server.engine.base import ScoreQuery, ScoringEngine
from teacher_server.engine.hf_engine import HfEngine
from teacher_server.engine.vllm_engine import VllmEngine
from teacher_wire.errors import TeacherError
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_families import VOCAB_SIZE, tiny_config

RIGHT_NATS = 1e-4
UNSURE_NATS = 0.1
"""Mean log-prob of sampled tokens below which a comparison would be of nothing."""
CONTEXT = 256
NUM_TOKENS = 160
"""Of a text: more than a block of vLLM's cache on a CPU, 128."""
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
}
"""Of tiny_families, as large as vLLM's kernels need it: heads of 32, experts that it pads."""
TIED_SCALE = 0.2
"""Of an embedding that is the head, too."""
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Cell:
    """What came of one family on one arm."""

    gap_nats: float | None = None
    refused: str | None = None
    """The typed error, where the family is refused when loaded."""
    raw: str | None = None
    """An error that is not typed."""

    @property
    def is_wrong(self) -> bool:
        """Neither right nor refused; NaN is not right."""
        is_right = self.gap_nats is not None and self.gap_nats <= RIGHT_NATS
        return self.refused is None and not is_right


Cells = dict[str, Cell]


def write_model(folder: Path, family: str) -> Path:
    """A checkpoint of a family, random by a seed."""
    # A second one costs more than it gives a model of this size.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = tiny_config(family, **WIDE)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    if config.get_text_config().tie_word_embeddings:
        # With a head of that size the last token follows itself, and every log-prob is 0.
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(TIED_SCALE)
    model.save_pretrained(folder)
    return folder


def texts() -> list[NDArray[np.int32]]:
    """Two random texts."""
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB_SIZE, n, dtype=np.int32) for n in (NUM_TOKENS, 40)]


async def learner_arm(folder: Path) -> Cells:
    """All log-probs of all positions, as the learner makes them in training mode."""
    model = load_student(str(folder), dtype=torch.float32, device=CPU)
    every = torch.arange(VOCAB_SIZE)
    gaps = []
    for text in texts():
        ids = torch.from_numpy(text).long()[None]
        response = ids[:, 1:]
        with torch.no_grad():
            (rows_BTV,) = student_forward(
                model,
                ids,
                torch.tensor([1]),
                response,
                torch.ones_like(response, dtype=torch.bool),
                (every.expand(1, response.shape[1], -1),),
                temperature=1.0,
            ).logprobs_at_BTN
            expected = plain_logits(model, ids)[:, :-1].float().log_softmax(-1)
        gaps.append((rows_BTV - expected).abs().max().item())
    return {"learner": Cell(float(np.max(gaps)))}


async def hf_sampler_arm(folder: Path) -> Cells:
    """The reference sampler."""
    sampler = HfSampler(model=str(folder), dtype="float32", device=CPU)
    written = WeightFormat(dtype="float32")
    return await _sampler_arm(folder, "hf sampler", sampler, written)


async def hf_batched_sampler_arm(folder: Path) -> Cells:
    """The batched sampler over transformers, with weights of its own."""
    sampler = HfBatchedSampler(
        model=str(folder),
        dtype="float32",
        device=CPU,
        max_num_seqs=8,
        stream_interval=8,
        kv_cache_gib=1.0,
        cpu_threads=1,
    )
    written = WeightFormat(dtype="float32")
    return await _sampler_arm(folder, "batched sampler", sampler, written)


async def vllm_sampler_arm(folder: Path) -> Cells:
    """vLLM as a run starts it."""
    sampler = VllmSampler(
        model=str(folder),
        dtype="float32",
        max_context=CONTEXT,
        max_num_topk=0,
        max_num_seqs=8,
        stream_interval=8,
        kv_cache_gib=1.0,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        cpu_cores=str(max(os.sched_getaffinity(0))),
        seed=0,
    )
    written = WeightFormat(dtype="float32", as_saved=True)
    return await _sampler_arm(folder, "vLLM sampler", sampler, written)


async def _sampler_arm(folder: Path, name: str, sampler: Sampler, written: WeightFormat) -> Cells:
    """As loaded, and after other weights were sent; what a run's own probe refuses is refused."""
    model = load_student(str(folder), dtype=torch.float32, device=CPU)
    learner = learner_of(model)
    window = learner.sliding_window
    long = probe_prompts(texts(), max_context=CONTEXT, sliding_window=window)
    prompts = [*long, texts()[1]]
    sync = WeightSync(
        learner, sampler, probe_prompts=prompts, max_logprob_gap=1e-3, written=written
    )
    proof = Proof(
        prompts=prompts,
        is_fresh=True,
        is_as_loaded=True,
        checkpoint_names=tensor_names(str(folder)) if written.as_saved else None,
    )
    cells: Cells = {}
    await sampler.start()
    try:
        cells[f"{name}, loaded"] = Cell(await _sampled_gap(sampler, learner, prompts))
        await sync.prove(0, proof)
        with learner.changed(), torch.no_grad():
            await sync.push(1)
            cells[f"{name}, synced"] = Cell(await _sampled_gap(sampler, learner, prompts))
    finally:
        await sampler.close()
    return cells


async def _sampled_gap(
    sampler: Sampler, learner: Learner, prompts: list[NDArray[np.int32]]
) -> float:
    """Of all prompts at once, as a run has them."""

    async def said(index: int) -> list[Delta]:
        options = SamplingOptions(max_tokens=16, temperature=1.0, seed=index)
        name = f"family-{index}"
        return [part async for part in sampler.generate(name, prompts[index], options)]

    gaps = []
    together = await asyncio.gather(*map(said, range(len(prompts))))
    for prompt, parts in zip(prompts, together, strict=True):
        tokens = np.concatenate([part.token_ids for part in parts])
        logprobs = np.concatenate([part.logprobs for part in parts])
        if np.abs(logprobs).mean() < UNSURE_NATS:
            raise ValueError(f"log-probs of {logprobs} say nothing: one token has it all")
        gaps.append(np.abs(learner.plain_logprobs(prompt, tokens) - logprobs).max())
    return float(np.max(gaps))


async def hf_teacher_arm(folder: Path) -> Cells:
    """The reference engine."""
    engine = HfEngine(model=str(folder), max_context=CONTEXT, device="cpu")
    return {"teacher, hf": await _teacher_cell(folder, engine)}


async def vllm_teacher_arm(folder: Path) -> Cells:
    """The vLLM engine, as a server starts it."""
    engine = VllmEngine(
        model=str(folder),
        max_context=CONTEXT,
        kv_cache_gib=0.05,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        enforce_eager=True,
        cpu_cores=str(max(os.sched_getaffinity(0))),
    )
    return {"teacher, vLLM": await _teacher_cell(folder, engine)}


async def _teacher_cell(folder: Path, engine: ScoringEngine) -> Cell:
    """Rows of a text that grows: of its tokens and of its most likely ones."""
    await engine.start()
    try:
        model = load_plain(folder)
        gaps = []
        for number, text in enumerate(texts()):
            with torch.no_grad():
                logits = plain_logits(model, torch.from_numpy(text).long()[None])[0, :-1]
            expected = logits.float().log_softmax(-1).numpy()
            first = 1
            for end in (len(text) * 2 // 3, len(text)):
                query = ScoreQuery(
                    token_ids=text[:end],
                    first_row=first,
                    candidate_ids=None,
                    k=8,
                    temperature=1.0,
                    session=str(number),
                )
                rows = await engine.score(query)
                wanted = expected[first - 1 : end - 1]
                at = np.take_along_axis(wanted, text[first:end, None].astype(np.int64), 1)[:, 0]
                top = np.take_along_axis(wanted, rows.topk_ids.astype(np.int64), 1)
                gaps += [
                    np.abs(rows.token_logprobs - at).max(),
                    np.abs(rows.topk_logprobs - top).max(),
                    np.abs(np.sort(top)[:, ::-1] - np.sort(wanted)[:, ::-1][:, :8]).max(),
                ]
                first = end
    finally:
        await engine.close()
    return Cell(float(np.max(gaps)))


def load_plain(folder: Path) -> Any:
    """By transformers alone."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


Arm = Callable[[Path], Awaitable[Cells]]
ARMS: dict[str, tuple[Arm, tuple[str, ...]]] = {
    "learner": (learner_arm, ("learner",)),
    "hf sampler": (hf_sampler_arm, ("hf sampler, loaded", "hf sampler, synced")),
    "batched sampler": (
        hf_batched_sampler_arm,
        ("batched sampler, loaded", "batched sampler, synced"),
    ),
    "vLLM sampler": (vllm_sampler_arm, ("vLLM sampler, loaded", "vLLM sampler, synced")),
    "teacher, hf": (hf_teacher_arm, ("teacher, hf",)),
    "teacher, vLLM": (vllm_teacher_arm, ("teacher, vLLM",)),
}
"""What makes the cells, and which columns they are."""


async def measured(name: str, folder: Path) -> Cells:
    """The cells of an arm; a typed error refuses the family on all of its columns."""
    arm, columns = ARMS[name]
    try:
        return await arm(folder)
    except (TrainerError, TeacherError) as error:
        refused = Cell(refused=_reason(error, folder))
    except Exception as error:  # noqa: BLE001 - what is not typed is what the table must show
        refused = Cell(raw=f"{type(error).__name__}: {_reason(error, folder)}")
    return dict.fromkeys(columns, refused)


def _reason(error: Exception, folder: Path) -> str:
    said = one_line(error).replace(str(folder), "the model")
    return said.partition("; its output is in")[0][:400]
