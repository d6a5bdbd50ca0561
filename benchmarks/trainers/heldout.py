"""What a student has of its teacher on held-out prompts, whoever trained it: one measurement.

    python -m benchmarks.trainers.heldout PAIR FOLDER...

In a process without either trainer: the student answers by transformers' own generation, both
models read each answer, and the reverse KL is the sum over the whole vocabulary at the temperature
of sampling (examples/language/measuring.py). One line a folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.trainers.pairs import PAIRS, heldout_prompts
from benchmarks.trainers.task import telling
from student_trainer.settings.config import load_config

SEED = 1
FIGURES = ("reverse_kl", "reverse_kl_error", "forward_kl", "length", "end_rate", "num_tokens")


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from examples.language import measuring
    from student_trainer.pretrained import load_tokenizer

    logging.disable_progress_bar()
    pair = PAIRS[sys.argv[1]]
    temperature = load_config(pair.config).rollout.temperature

    def loaded(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    with telling() as tell:
        tokenizer = load_tokenizer(str(pair.student))
        prompts, teacher = heldout_prompts(pair), loaded(pair.teacher)
        for folder in sys.argv[2:]:
            student = loaded(Path(folder))
            answers = measuring.sampled(
                student,
                tokenizer,
                prompts,
                num_samples=1,
                max_tokens=pair.max_tokens,
                temperature=temperature,
                seed=SEED,
            )
            compared = [
                measuring.positions(student, teacher, answer, temperature=temperature)
                for answer in answers
            ]
            found = measuring.figures(answers, compared).values()
            tell("heldout", folder=folder, figures={name: found[name] for name in FIGURES})


if __name__ == "__main__":
    main()
