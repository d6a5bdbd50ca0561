"""One measurement of benchmarks.learner_growth, alone or as one of torchrun's processes."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

SMALL_STEP_TOKENS = 64
"""Of the update that warms up."""


def update(*, rank: int, sequences: int, tokens: int) -> dict[str, float]:
    """Seconds of forward, backward and AdamW; the largest of all processes."""
    import torch

    from benchmarks.learner_child import SMALL, random_student
    from student_trainer.learner.adapter import ALL_LINEAR, LoraShape, adapted, new_config
    from student_trainer.learner.optim import Optimizer
    from student_trainer.learner.sharding import shard
    from student_trainer.learner.student import response_logprobs, student_forward
    from student_trainer.process.ranks import joined

    with joined() as ranks:
        model = random_student(SMALL, tokens, "cpu")
        if rank:
            shape = LoraShape(rank=rank, alpha=2.0 * rank, targets=ALL_LINEAR, rslora=False)
            adapted(model, new_config(shape, "random"))
        shard(model, response_logprobs)
        optimizer = Optimizer(
            model,
            learning_rate=1e-4,
            final_learning_rate=1e-4,
            warmup_updates=0,
            total_updates=10,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            max_grad_norm=1.0,
        )
        own = sequences // ranks.world
        vocab = model.config.vocab_size
        ids_BS = torch.randint(vocab, (own, tokens), generator=torch.Generator().manual_seed(0))

        def step(length: int) -> None:
            prompt = length // 8
            gathered = student_forward(
                model,
                ids_BS[:, :length],
                torch.full((own,), prompt),
                ids_BS[:, prompt:length],
                torch.ones(own, length - prompt, dtype=torch.bool),
                (),
                temperature=1.0,
            )
            gathered.logprobs_BT.sum().backward()
            optimizer.step(1.0 / (sequences * length))

        step(SMALL_STEP_TOKENS)
        ranks.gathered(None)  # all begin at once
        started = time.perf_counter()
        step(tokens)
        seconds = max(ranks.gathered(time.perf_counter() - started))
        found = {"seconds": seconds, "tokens_per_s": sequences * tokens / seconds}
        return found if ranks.is_first else {}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learner_growth_child")
    for name in ("rank", "sequences", "tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments: dict[str, Any] = vars(parser.parse_args())
    if found := update(**arguments):
        print(json.dumps(found))


if __name__ == "__main__":
    main()
