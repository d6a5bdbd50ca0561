"""Models, batches and the training loop of the playground's two checkpoints.

Shapes: B = sequences, T = positions, S = spellings (3).
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.playground.muon import Muon
from examples.playground.task import (
    LINE_LENGTH,
    PROMPT_LENGTH,
    SPELLING_ODDS,
    Problem,
    draw_problem,
    is_heldout,
)
from examples.playground.vocabulary import (
    EOS_ID,
    ID_SYMBOLS,
    SPELLING_IDS,
    VOCABULARY_SIZE,
    ascii_ids,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences of one length, so that nothing is padded."""

    input_ids: torch.Tensor
    """[B, T]: prompt, solution in random spellings, end of sequence, all but the last position."""
    target_ids: torch.Tensor
    """[B, T - PROMPT_LENGTH + 1, S]: right tokens of the response, one per spelling."""


def draw_trainable(rng: random.Random, num_rounds: int) -> Problem:
    """A problem outside the held-out tenth."""
    while is_heldout(problem := draw_problem(rng, num_rounds)):
        pass
    return problem


def make_batch(problems: list[Problem], num_lines: int | None, rng: np.random.Generator) -> Batch:
    """A batch of problems with one number of rounds.

    `num_lines` cuts every solution after that many lines; None keeps it whole, with the answer
    and the end of sequence.
    """
    prompts = np.array([ascii_ids(problem.prompt) for problem in problems])
    length = None if num_lines is None else LINE_LENGTH * num_lines
    symbols = ID_SYMBOLS[[ascii_ids(problem.solution[:length]) for problem in problems]]
    targets = SPELLING_IDS[:, symbols]
    choices = rng.choice(len(SPELLING_ODDS), size=symbols.shape, p=SPELLING_ODDS)
    spelled = SPELLING_IDS[choices, symbols]
    input_ids = np.concatenate([prompts, spelled], axis=1)
    if num_lines is None:
        targets = np.pad(targets, ((0, 0), (0, 0), (0, 1)), constant_values=EOS_ID)
    else:
        input_ids = input_ids[:, :-1]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        target_ids=torch.from_numpy(targets.transpose(1, 2, 0).copy()),
    )


def spelling_cross_entropy(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean nats per response token of KL(right distribution over spellings || model)."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, PROMPT_LENGTH - 1 :]
    logprobs_BTS = torch.log_softmax(logits, -1).gather(-1, batch.target_ids)
    odds = torch.tensor(SPELLING_ODDS)
    entropy_BT = -(odds * odds.log()).sum() * (batch.target_ids != EOS_ID).any(-1)
    return -((logprobs_BTS * odds).sum(-1) + entropy_BT).mean()


def build_model(*, num_layers: int, hidden_size: int, seed: int) -> Qwen3ForCausalLM:
    """A random Qwen3 model whose spellings of one symbol start with nearly equal embeddings."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight.normal_(0, hidden_size**-0.5)
            for ids in SPELLING_IDS[1:]:
                weight[ids] = weight[SPELLING_IDS[0]] + 0.3 * weight[ids]
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of a curriculum: what the batches of some consecutive steps are drawn from."""

    num_steps: int
    lessons: tuple[tuple[int, int | None], ...]
    """(rounds of the problem, lines shown or None for all of it), each equally likely."""


BATCH_TOKENS = 4500
"""Tokens of a training batch, rounded down to whole sequences."""


def batches(stages: tuple[Stage, ...], seed: int) -> Iterator[Batch]:
    """One batch a step, stage after stage; the same seed gives the same batches."""
    problem_rng, spelling_rng = random.Random(seed), np.random.default_rng(seed)
    for stage in stages:
        for _ in range(stage.num_steps):
            num_rounds, num_lines = problem_rng.choice(stage.lessons)
            length = PROMPT_LENGTH + LINE_LENGTH * (num_lines or num_rounds)
            problems = [
                draw_trainable(problem_rng, num_rounds) for _ in range(BATCH_TOKENS // length)
            ]
            yield make_batch(problems, num_lines, spelling_rng)


def build_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, head and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    model: Qwen3ForCausalLM,
    stages: tuple[Stage, ...],
    *,
    seed: int,
    report: Callable[[int, float], None],
) -> None:
    """Train in place: warm-up, a constant rate to half-way, then linearly to 2 % of the rate.

    `report` receives every step's number, from 1, and its loss.
    """
    optimizers = build_optimizers(model)
    num_steps = sum(stage.num_steps for stage in stages)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / 20, 1.0, max(2 * (1 - step / num_steps), 0.02))
        )
        for optimizer in optimizers
    ]
    model.train()
    for step, batch in enumerate(batches(stages, seed), start=1):
        loss = spelling_cross_entropy(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        report(step, loss.item())
    model.eval()
