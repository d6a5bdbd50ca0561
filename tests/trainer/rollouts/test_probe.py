"""Learner and sampler are held against each other before the first rollout.

Run: python -m pytest tests/trainer/rollouts/test_probe.py
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from student_trainer.assembly import from_settings, syncing
from student_trainer.assembly.from_settings import Problems
from student_trainer.errors import WeightSyncError
from student_trainer.pretrained import load_student, tensor_names
from student_trainer.records import AS_LEARNT, Delta, Prompt, SamplingOptions, WeightFormat
from student_trainer.rollouts.probe import (
    CACHE_BLOCK,
    PROBE_TOKENS,
    Proof,
    StartGaps,
    probe_prompts,
)
from student_trainer.rollouts.samplers.base import Weights
from student_trainer.rollouts.samplers.hf_sampler import HfSampler
from student_trainer.rollouts.weight_sync import WeightSync
from student_trainer.settings.config import load_config
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_families import VOCAB_SIZE as FAMILY_VOCAB_SIZE
from tests.trainer.learner.tiny_families import tiny_family
from tests.trainer.learner.tiny_student import (
    character_tokenizer,
    tiny_student,
    write_tiny_student,
)
from tests.trainer.settings.smallest_config import SMALLEST

CPU = torch.device("cpu")
PROMPTS = [np.arange(5, 30, dtype=np.int32), np.arange(40, 2, -1, dtype=np.int32)]
PROOF = Proof(prompts=PROMPTS, is_fresh=True, is_as_loaded=True)
AS_SAVED = WeightFormat(as_saved=True)
CLOSE = 1e-4


async def proven(
    folder: Path,
    sampler: type[HfSampler] = HfSampler,
    *,
    proof: Proof = PROOF,
    dtype: str = "float32",
    written: WeightFormat = AS_LEARNT,
    limit: float = 1e-3,
) -> tuple[PreTrainedModel, StartGaps]:
    """Of a student of this folder, and the student."""
    engine = sampler(model=str(folder), dtype=dtype, device=CPU)
    await engine.start()
    model = load_student(str(folder), dtype=torch.float32, device=CPU)
    sync = WeightSync(
        learner_of(model), engine, probe_prompts=PROMPTS, max_logprob_gap=limit, written=written
    )
    return model, await sync.prove(0, proof)


def tiny_gpt2(n_positions: int = 64) -> GPT2LMHeadModel:
    """Random, with learned positions."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=n_positions,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def problems_of(*prompts: NDArray[np.int32]) -> Problems:
    """To train on, of these ids."""
    return Problems(
        tokenizer=character_tokenizer(),
        train=[
            Prompt(prompt_id=f"p{i}", text="", token_ids=ids, answer=None)
            for i, ids in enumerate(prompts)
        ],
        heldout=[],
    )


def saved(folder: Path, family: str) -> Path:
    tiny_family(family).save_pretrained(folder)
    return folder


async def test_equal_ones_are_proven_and_the_weights_are_the_very_same(tmp_path: Path) -> None:
    folder = write_tiny_student(tmp_path, tied=True)
    before = load_student(str(folder), dtype=torch.float32, device=CPU).state_dict()
    model, gaps = await proven(folder)
    assert all(gap is not None and gap < CLOSE for gap in gaps.figures().values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


async def test_a_resumed_run_and_a_running_sampler_compare_what_they_can(tmp_path: Path) -> None:
    proof = replace(PROOF, is_fresh=False, is_as_loaded=False)
    _, gaps = await proven(write_tiny_student(tmp_path), proof=proof)
    assert (gaps.plain, gaps.loaded) == (None, None)
    assert gaps.changed is not None
    assert gaps.pushed is not None


class Scaled(HfSampler):
    """Leaves out the scale of its family's logits, as an engine that does not know it."""

    async def start(self) -> None:
        await super().start()
        self._model().config.logits_scaling = 1.0
        self._model().logits_scaling = 1.0  # type: ignore[assignment]


async def test_a_family_that_the_sampler_computes_otherwise_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightSyncError) as caught:
        await proven(saved(tmp_path, "granite"), Scaled)
    said = str(caught.value)
    assert "the sampler as it loaded the checkpoint differs from the learner's log-probs by" in said
    assert "more than 0.001 (optim.max_sync_gap_nats)" in said
    assert "computes this family otherwise" in said
    assert "granite (GraniteForCausalLM); its config has" in said
    assert "logits_scaling 8.0" in said
    assert "of plain model(ids).logits, so the sampler" in said


async def test_precision_is_named_with_both_dtypes_and_the_limit(tmp_path: Path) -> None:
    folder, written = write_tiny_student(tmp_path), WeightFormat(dtype="bfloat16")
    with pytest.raises(
        WeightSyncError,
        match=r"computes in float32.*arithmetic bfloat16.*the same dtype on both sides.*"
        r"or a larger optim\.max_sync_gap_nats",
    ):
        await proven(folder, dtype="bfloat16", written=written)


class Forgetful(HfSampler):
    """Passes over one tensor, as an engine does with a name that it does not know."""

    forgotten = "model.layers.1.input_layernorm.weight"

    async def load_weights(self, weights: Weights) -> None:
        given = dict(weights)
        given[self.forgotten] = self._model().state_dict()[self.forgotten].clone()
        await super().load_weights(iter(given.items()))


@pytest.mark.parametrize(
    "name", [Forgetful.forgotten, "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
)
async def test_a_tensor_that_does_not_arrive_is_found_before_the_first_rollout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With unchanged weights no gap would tell: the sampler has that tensor already."""
    monkeypatch.setattr(Forgetful, "forgotten", name)
    folder = write_tiny_student(tmp_path)
    before = load_student(str(folder), dtype=torch.float32, device=CPU)
    with pytest.raises(
        WeightSyncError,
        match=r"sent changed weights, differs .* nats, more than 0\.001.*"
        r"as loaded the two were equal.*names or their layout",
    ):
        await proven(folder, Forgetful)
    engine = Forgetful(model=str(folder), dtype="float32", device=CPU)
    await engine.start()
    sync = WeightSync(learner_of(before), engine, probe_prompts=PROMPTS, max_logprob_gap=1e-3)
    assert await sync.push(0) < CLOSE


async def test_a_tensor_of_zeros_that_does_not_arrive_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the biases of a model are that was never trained."""
    name = "model.layers.1.self_attn.v_proj.bias"
    monkeypatch.setattr(Forgetful, "forgotten", name)
    assert not tiny_family("qwen2").state_dict()[name].any()
    with pytest.raises(WeightSyncError, match=r"sent changed weights, differs"):
        await proven(saved(tmp_path, "qwen2"), Forgetful)


ZERO_AND_NEAR = [0x00000000, 0x00000001, 0x00080000, 0x007FFFFF, 0x3C800001, 0x3C880001, 0x3C800000]


def test_changed_weights_differ_and_have_their_very_bits_again() -> None:
    """Zeros of both signs, subnormals, and what zeros and subnormals become."""
    model = tiny_student()
    bits = torch.tensor([bits | sign for bits in ZERO_AND_NEAR for sign in (0, 1 << 31)])
    with torch.no_grad():
        flat = model.model.norm.weight.view(torch.int32)
        flat[: len(bits)] = bits.to(torch.uint32).view(torch.int32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with learner_of(model).changed():
        for name, tensor in model.state_dict().items():
            assert (tensor.view(torch.int32) != before[name].view(torch.int32)).all(), name
            zeros = before[name] == 0
            assert (tensor[zeros].bfloat16().abs() > 0.01).all(), name
        assert (before["model.norm.weight"] == 0).sum() == 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), name


class Random(HfSampler):
    """Its log-probs are no numbers."""

    async def generate(
        self, request_id: str, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> AsyncIterator[Delta]:
        async for delta in super().generate(request_id, prompt_ids, options):
            yield replace(delta, logprobs=delta.logprobs * np.nan)


async def test_log_probs_that_are_no_numbers_are_not_proven(tmp_path: Path) -> None:
    with pytest.raises(WeightSyncError, match="by nan nats"):
        await proven(write_tiny_student(tmp_path), Random)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gemma3", "qwen2", "gpt_neox"])
def test_weights_are_sent_under_the_names_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    """transformers holds experts fused, and the parts of a wrapper under other names."""
    folder = saved(tmp_path / "student", family)
    model = load_student(str(folder), dtype=torch.float32, device=CPU)
    learner = learner_of(model)
    assert learner.vocab_size == FAMILY_VOCAB_SIZE
    given = dict(learner.weights(AS_SAVED))
    assert given.keys() == tensor_names(str(folder))
    (tmp_path / "sent").mkdir()
    save_file(given, tmp_path / "sent" / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path / "sent")
    sent = AutoModelForCausalLM.from_pretrained(tmp_path / "sent", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(sent.state_dict()[name], tensor), name


async def test_names_that_the_checkpoint_does_not_have_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "qwen3_moe")
    proof = replace(PROOF, checkpoint_names=tensor_names(str(folder)))
    with pytest.raises(WeightSyncError) as caught:
        await proven(folder, proof=proof)  # as they are in memory
    said = str(caught.value)
    assert said.startswith("4 tensors of the student have names that the sampler's checkpoint does")
    assert "model.layers.0.mlp.experts.gate_up_proj" in said
    assert "instead" in said
    assert "the checkpoint has model.layers.0.mlp.experts.0.down_proj.weight" in said
    assert 'sampler.kind = "hf_batched"' in said


def renamed(folder: Path, name: Callable[[str], str]) -> frozenset[str]:
    """Gives the tensors of a checkpoint other names, and tells them."""
    tensors = load_file(folder / "model.safetensors")
    others = {name(old): tensor for old, tensor in tensors.items()}
    save_file(others, folder / "model.safetensors", metadata={"format": "pt"})
    return frozenset(others)


async def test_a_checkpoint_may_leave_out_the_name_of_the_base_model(tmp_path: Path) -> None:
    """As openai-community/gpt2 does; transformers and vLLM put it before the names."""
    tiny_gpt2().save_pretrained(tmp_path)
    names = renamed(tmp_path, lambda name: name.removeprefix("transformer."))
    assert "h.0.attn.c_attn.weight" in names
    proof = replace(PROOF, checkpoint_names=names)
    _, gaps = await proven(tmp_path, proof=proof, written=AS_SAVED)
    assert gaps.changed is not None
    assert gaps.changed < CLOSE


@pytest.mark.parametrize("prefix", ["", "another."])
async def test_a_checkpoint_may_have_its_tied_head_alone(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedding's other name; a third one is none of it."""
    folder = write_tiny_student(tmp_path, tied=True)
    head = f"{prefix}lm_head.weight"
    names = tensor_names(str(folder)) or frozenset()
    proof = replace(PROOF, checkpoint_names=names - {"model.embed_tokens.weight"} | {head})
    if prefix:
        with pytest.raises(WeightSyncError, match=r"^1 tensors .* reach it: model\.embed_tokens"):
            await proven(folder, proof=proof, written=AS_SAVED)
    else:
        await proven(folder, proof=proof, written=AS_SAVED)
        assert "stay as they are in the sampler" not in capsys.readouterr().out


def test_probe_prompts_are_longer_than_a_block_and_a_window_and_fit_the_context() -> None:
    first, second = probe_prompts(PROMPTS, max_context=4096, sliding_window=None)
    assert len(first) > CACHE_BLOCK
    assert len(second) > CACHE_BLOCK
    assert (first[:CACHE_BLOCK] == second[:CACHE_BLOCK]).all()
    assert set(first) | set(second) <= set(np.concatenate(PROMPTS))
    assert len(probe_prompts(PROMPTS, max_context=4096, sliding_window=512)[0]) > 512
    short = probe_prompts(PROMPTS, max_context=48, sliding_window=512)
    assert [len(ids) for ids in short] == [48 - PROBE_TOKENS] * 2
    assert [len(ids) for ids in probe_prompts(PROMPTS, max_context=4, sliding_window=None)] == [
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("device", "window", "max_context", "longest"),
    [
        ("cuda", 262144, 32768, CACHE_BLOCK + PROBE_TOKENS),
        ("cuda", 4096, 4096, CACHE_BLOCK + PROBE_TOKENS),
        ("cuda", 4096, 8192, 4096 + PROBE_TOKENS),
        ("cpu", 4096, 8192, CACHE_BLOCK + PROBE_TOKENS),
        ("cpu", 512, 8192, 512 + PROBE_TOKENS),
        ("cuda", None, 8192, CACHE_BLOCK + PROBE_TOKENS),
    ],
)
def test_a_window_that_no_context_passes_is_not_probed(
    device: str,
    window: int | None,
    max_context: int,
    longest: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(from_settings, "device", lambda config: torch.device(device))
    path = tmp_path / "trainer.toml"
    path.write_text(SMALLEST, encoding="utf-8")
    config = load_config(path, [f"rollout.max_context={max_context}"])
    model = tiny_family("mistral")
    model.config.sliding_window = window
    proof = syncing.proof(
        config, learner_of(model), problems_of(*PROMPTS), str(tmp_path), True, True
    )
    assert max(len(ids) for ids in proof.prompts) == max(longest, CACHE_BLOCK + 2 * PROBE_TOKENS)


async def test_the_probes_of_a_sync_leave_room_for_their_tokens(tmp_path: Path) -> None:
    """A budget of 4 tokens is less than a probe samples, and positions are learned."""
    tiny_gpt2(n_positions=24).save_pretrained(tmp_path)
    model = load_student(str(tmp_path), dtype=torch.float32, device=CPU)
    path = tmp_path / "trainer.toml"
    path.write_text(SMALLEST, encoding="utf-8")
    changes = ["student.device=cpu", "rollout.max_context=24", "budget.max_tokens=4"]
    config = load_config(path, changes)
    sampler = HfSampler(model=str(tmp_path), dtype="float32", device=CPU)
    await sampler.start()
    problems = problems_of(np.arange(20, dtype=np.int32), np.arange(3, dtype=np.int32))
    sync = syncing.sync(config, learner_of(model), sampler, problems, print)
    assert await sync.push(0) < CLOSE


def test_plain_log_probs_ask_for_no_logits_of_the_prompt() -> None:
    model, rows = tiny_student(), []
    model.lm_head.register_forward_hook(lambda *called: rows.append(called[2].shape[1]))
    learner, (prompt, tokens) = learner_of(model), (PROMPTS[1], PROMPTS[0][:7])
    given = learner.plain_logprobs(prompt, tokens)
    assert rows == [8]
    assert np.abs(given - learner.logprobs(prompt, tokens)).max() < CLOSE
    again = model(torch.from_numpy(prompt).long()[None])
    assert again.logits.shape[1] == len(prompt)


def test_a_window_too_long_to_be_proven_on_a_cpu_is_said(tmp_path: Path) -> None:
    path = tmp_path / "trainer.toml"
    path.write_text(SMALLEST, encoding="utf-8")

    def said(window: int | None, max_context: int) -> list[str]:
        model = tiny_family("mistral")
        model.config.sliding_window = window
        changes = ("student.device=cpu", f"rollout.max_context={max_context}")
        return list(syncing.warnings(load_config(path, changes), learner_of(model)))

    (line,) = said(4096, 8192)
    assert "sliding window is 4096 tokens" in line
    assert "rollout.max_context up to 4096 needs no proof" in line
    assert said(4096, 4096) == said(512, 8192) == said(None, 8192) == []
