"""One measurement of the learner in a fresh process: prints seconds and bytes as JSON. Linux only.

    python -m benchmarks.learner_child head --arm naive --rows 2048
    python -m benchmarks.learner_child learner --arm checkpointing --sequences 4 --tokens 512

Peaks are above what was there before: weights and their gradients. On a CPU of resident memory, on
a GPU of PyTorch's allocator.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.memory_child import forget_peak, status_bytes
from benchmarks.models import SHAPES, Shape, qwen3_config

if TYPE_CHECKING:
    from torch import Tensor

IDS = 49
"""Log-probs a row: of the sampled token, 32 of the teacher's and 16 of the student's."""
TWO_PASS_IDS = 8192
WARM_UP_ROWS = 32
SMALL = Shape(hidden=256, layers=6, heads=8, kv_heads=4, intermediate=768, head_dim=32, vocab=8192)
"""For a CPU."""
Backward = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], None]
"""Of weight, hidden states, ids and the gradient of the log-probs: adds to `.grad` of both."""


def naive(weight_VD: Tensor, hidden_RD: Tensor, ids_RN: Tensor, grad_RN: Tensor) -> None:
    """All logits at once."""
    logits_RV = (hidden_RD @ weight_VD.to(hidden_RD.dtype).T).float()
    logprobs_RN = logits_RV.log_softmax(-1).gather(1, ids_RN)
    logprobs_RN.backward(grad_RN)


def two_pass(weight_VD: Tensor, hidden_RD: Tensor, ids_RN: Tensor, grad_RN: Tensor) -> None:
    """A plain loop over the vocabulary: log-sum-exp first, then the gradients."""
    import torch

    weight, hidden = weight_VD.detach().to(hidden_RD.dtype), hidden_RD.detach()
    slices = [slice(i, i + TWO_PASS_IDS) for i in range(0, len(weight), TWO_PASS_IDS)]
    lse_R = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    for vocab in slices:
        lse_R = torch.logaddexp(lse_R, (hidden @ weight[vocab].T).float().logsumexp(1))
    sums_R1 = grad_RN.sum(1, keepdim=True)
    assert weight_VD.grad is not None
    assert hidden_RD.grad is not None
    for vocab in slices:
        gradient = (hidden @ weight[vocab].T).float().sub_(lse_R.unsqueeze(1)).exp_().mul_(-sums_R1)
        inside = (ids_RN >= vocab.start) & (ids_RN < vocab.stop)
        rows, places = inside.nonzero(as_tuple=True)
        columns = ids_RN[rows, places] - vocab.start
        gradient.index_put_((rows, columns), grad_RN[rows, places], accumulate=True)
        gradient = gradient.to(hidden.dtype)
        hidden_RD.grad += gradient @ weight[vocab]
        weight_VD.grad[vocab] += gradient.T @ hidden


def driftline(weight_VD: Tensor, hidden_RD: Tensor, ids_RN: Tensor, grad_RN: Tensor) -> None:
    """The learner's."""
    from student_trainer.learner.head import Head
    from student_trainer.learner.head_logprobs import head_logprobs

    logprobs_RN, _ = head_logprobs(
        Head(weight_VD=weight_VD), hidden_RD, ids_RN, dtype=hidden_RD.dtype
    )
    logprobs_RN.backward(grad_RN)


def liger(weight_VD: Tensor, hidden_RD: Tensor, ids_RN: Tensor, grad_RN: Tensor) -> None:
    """liger-kernel's fused cross-entropy: of one id a row, for it knows no others."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    loss(weight_VD.to(hidden_RD.dtype), hidden_RD, ids_RN[:, 0]).backward()


HEADS: dict[str, Backward] = {
    "naive": naive,
    "two_pass": two_pass,
    "driftline": driftline,
    "liger": liger,
}


def head(arm: str, *, rows: int, vocab: int, hidden: int, device: str) -> dict[str, float]:
    """Forward and backward of the head alone."""
    import torch

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    draw = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": draw, "device": device}
    weight_VD = torch.randn(vocab, hidden, **options).mul_(0.03).requires_grad_()
    hidden_RD = torch.randn(rows, hidden, **options).to(dtype).requires_grad_()
    weight_VD.grad, hidden_RD.grad = torch.zeros_like(weight_VD), torch.zeros_like(hidden_RD)
    ids_RN = torch.randint(vocab, (rows, IDS), **options)
    grad_RN = torch.randn(rows, IDS, **options)

    def warm_up() -> None:
        part_RD = hidden_RD.detach()[:WARM_UP_ROWS].clone().requires_grad_()
        part_RD.grad = torch.zeros_like(part_RD)
        few_VD = weight_VD.detach()[:TWO_PASS_IDS].requires_grad_()
        few_VD.grad = torch.zeros_like(few_VD)
        few_ids = ids_RN[:WARM_UP_ROWS] % len(few_VD)
        HEADS[arm](few_VD, part_RD, few_ids, grad_RN[:WARM_UP_ROWS])

    return _measured(warm_up, lambda: HEADS[arm](weight_VD, hidden_RD, ids_RN, grad_RN), device)


def learner(arm: str, *, sequences: int, tokens: int, shape: str, device: str) -> dict[str, float]:
    """Forward and backward of a whole student, from ids to gradients."""
    import torch

    from student_trainer.learner.student import student_forward

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = random_student(SMALL if shape == "small" else SHAPES[shape], tokens, device)
    if arm == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    prompt = tokens // 8
    vocab = model.config.vocab_size
    ids_BS = torch.randint(vocab, (sequences, tokens), device=device)
    mask_BT = torch.ones(sequences, tokens - prompt, dtype=torch.bool, device=device)
    if arm == "padded":
        mask_BT[-1, mask_BT.shape[1] // 2 :] = False

    def step(length: int) -> None:
        asked_BTN = torch.randint(vocab, (sequences, length - prompt, IDS - 1), device=device)
        gathered = student_forward(
            model,
            ids_BS[:, :length],
            torch.full((sequences,), prompt, device=device),
            ids_BS[:, prompt:length],
            mask_BT[:, : length - prompt],
            (asked_BTN,),
            temperature=1.0,
            dtype=dtype,
        )
        (gathered.logprobs_BT.sum() + gathered.logprobs_at_BTN[0].sum()).backward()

    measured = _measured(lambda: step(prompt + 8), lambda: step(tokens), device)
    return measured | {"positions_per_s": sequences * tokens / measured["seconds"]}


def random_student(shape: Shape, positions: int, device: str) -> Any:
    import torch
    from transformers import Qwen3ForCausalLM

    config = qwen3_config(shape, max_position_embeddings=max(positions, shape.positions))
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM(config).float().train()  # type: ignore[no-untyped-call]


def _measured(warm_up: Callable[[], None], work: Callable[[], None], device: str) -> Any:
    import torch

    warm_up()
    if device == "cpu":
        before = status_bytes("VmRSS")
        forget_peak()
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started, cpu_started = time.perf_counter(), time.process_time()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = status_bytes("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "extra_gib": max(0, peak - before) / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learner_child")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for_head = kinds.add_parser("head")
    for_head.add_argument("--arm", choices=HEADS, required=True)
    for name in ("rows", "vocab", "hidden"):
        for_head.add_argument(f"--{name}", type=int, required=True)
    for_learner = kinds.add_parser("learner")
    for_learner.add_argument("--arm", choices=("plain", "checkpointing", "padded"), required=True)
    for name in ("sequences", "tokens"):
        for_learner.add_argument(f"--{name}", type=int, required=True)
    for_learner.add_argument("--shape", choices=("small", *SHAPES), required=True)
    for kind in (for_head, for_learner):
        kind.add_argument("--device", required=True)
    arguments = vars(parser.parse_args())
    measure = head if arguments.pop("kind") == "head" else learner
    print(json.dumps(measure(**arguments)))


if __name__ == "__main__":
    main()
