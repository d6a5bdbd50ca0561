"""(c) An update of the learner beside a naive one: all weights, and an adapter.

Forward, backward and AdamW of one sequence; weights that are learnt are float32, the arithmetic is
bfloat16 (on a CPU float32), as in a run. The learner's part is its forward pass, its head and its
optimiser; the loss is a sum of log-probs at as many ids as a run asks for, because the losses need
pydantic. Naive is `model(ids).logits`, its log-softmax in float32, and the same optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.device import Row, arithmetic, attempted, free, held_gib, peak_of, timed
from benchmarks.gpu.sizes import Sizes
from benchmarks.learner_child import IDS, random_student
from benchmarks.models import Shape
from student_trainer.learner.optim import Optimizer
from student_trainer.learner.student import student_forward

RANK = 16
WARM_UP_TOKENS = 64
PROMPT_SHARE = 1 / 8
"""Of a sequence; it has no rows in the head."""
Update = Callable[[int], None]
"""Forward and backward of a sequence's first tokens."""


def rows(sizes: Sizes, device: str, rate: float, card: str) -> Iterator[Row]:
    """Of all weights. `rate`: TFLOP/s that a product reaches here."""
    yield from _rows(sizes, device, rate, card, adapted=False)


def lora_rows(sizes: Sizes, device: str, rate: float, card: str) -> Iterator[Row]:
    """Of an adapter on a frozen student in the arithmetic."""
    yield from _rows(sizes, device, rate, card, adapted=True)


def _rows(sizes: Sizes, device: str, rate: float, card: str, *, adapted: bool) -> Iterator[Row]:
    for name, made in (("learner", learners), ("naive", naive)):
        for tokens in sizes.tokens:
            work = partial(figures, sizes.shape, device, tokens, made, rate, card, adapted)
            # All logits of a long sequence may be more than there is.
            yield attempted(f"{name}, {tokens:,} tokens", work, may_lack_memory=name == "naive")
            free()


def figures(
    shape: Shape,
    device: str,
    tokens: int,
    made: Callable[[Any, int, str], Update],
    rate: float,
    card: str,
    adapted: bool,
) -> dict[str, float]:
    """Of forward and backward; the optimiser's step stands by itself."""
    model = (
        adapted_student(shape, tokens, device) if adapted else random_student(shape, tokens, device)
    )
    optimizer, learnt = optimizer_of(model), [p for p in model.parameters() if p.requires_grad]
    update = made(model, tokens, device)

    def gradients() -> None:
        for parameter in learnt:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        optimizer.step(1.0 / tokens)

    update(min(WARM_UP_TOKENS, tokens))
    step()
    gradients()
    update(tokens)
    held = held_gib(device)
    passes = timed(lambda: update(tokens), device)
    steps = timed(step, device, before=gradients)
    flops = flops_per_token(shape, tokens, adapted=adapted) * tokens / passes.seconds / 1e12
    found = {
        "tokens_per_s": tokens / passes.seconds,
        "tflops": flops,
        "of_product": flops / rate,
        "extra_gib": passes.extra_gib,
        "held_gib": held,
        "optimizer_ms": 1000 * steps.seconds,
    }
    peak = peak_of(card)
    return found if peak is None else {**found, "of_card": flops / peak}


def flops_per_token(shape: Shape, tokens: int, *, adapted: bool) -> float:
    """Of the model's products, forward and backward; what is computed anew does not count.

    Six for each weight, four for a frozen one; of the attention what a causal mask leaves.
    """
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = shape.hidden * (2 * query + 2 * key + 3 * shape.intermediate)
    weights = shape.layers * layer + shape.vocab * shape.hidden * (1 - PROMPT_SHARE)
    return (4 if adapted else 6) * weights + 6 * tokens * query * shape.layers


def learners(model: Any, tokens: int, device: str) -> Update:
    """As the learner passes a micro-batch of one."""
    ids_BS, asked_BTN = _asked(model, tokens, device)

    def update(length: int) -> None:
        prompt = int(length * PROMPT_SHARE)
        gathered = student_forward(
            model,
            ids_BS[:, :length],
            torch.full((1,), prompt, device=device),
            ids_BS[:, prompt:length],
            torch.ones(1, length - prompt, dtype=torch.bool, device=device),
            (asked_BTN[:, prompt:length],),
            temperature=1.0,
            dtype=arithmetic(device),
        )
        (gathered.logprobs_BT.sum() + gathered.logprobs_at_BTN[0].sum()).backward()

    return update


def naive(model: Any, tokens: int, device: str) -> Update:
    """The same sum from all logits."""
    ids_BS, asked_BTN = _asked(model, tokens, device)
    dtype = arithmetic(device)

    def update(length: int) -> None:
        prompt = int(length * PROMPT_SHARE)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits_BTV = model(input_ids=ids_BS[:, :length], use_cache=False).logits
        logprobs_BTV = logits_BTV[:, prompt - 1 : -1].float().log_softmax(-1)
        own = logprobs_BTV.gather(2, ids_BS[:, prompt:length, None])
        others = logprobs_BTV.gather(2, asked_BTN[:, prompt:length])
        (own.sum() + others.sum()).backward()

    return update


def adapted_student(shape: Shape, tokens: int, device: str) -> Any:
    """With an adapter in float32 on weights in the arithmetic."""
    from student_trainer.learner.adapter import ALL_LINEAR, LoraShape, adapted, new_config

    model = random_student(shape, tokens, device).to(arithmetic(device))
    lora = LoraShape(rank=RANK, alpha=2.0 * RANK, targets=ALL_LINEAR, rslora=False)
    adapted(model, new_config(lora, "random"))
    return model


def optimizer_of(model: Any) -> Optimizer:
    """AdamW as a run has it."""
    return Optimizer(
        model,
        learning_rate=1e-5,
        final_learning_rate=1e-5,
        warmup_updates=0,
        total_updates=10,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        max_grad_norm=1.0,
    )


def _asked(model: Any, tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    vocab = model.config.vocab_size
    draw: dict[str, Any] = {
        "device": device,
        "generator": torch.Generator(device).manual_seed(0),
    }
    ids_BS = torch.randint(vocab, (1, tokens), **draw)
    return ids_BS, torch.randint(vocab, (1, tokens, IDS - 1), **draw)
