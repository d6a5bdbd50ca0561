"""Two pairs of models to take a step with, and how trainer and teacher are configured for them.

The playground's are trained; those in SmolLM2's shape are random, for time does not depend on the
values. With one update a step, like the comparison with other trainers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import ROOT
from benchmarks.trainer_work import CHECKPOINTS, LANGUAGE, PLAYGROUND, Work

FOLDER = ROOT / "runs" / "bench-models"
NUM_PROMPTS, PROMPT_WORDS = 1024, (40, 80)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """What decides the cost of a Llama."""

    layers: int
    hidden: int = 576
    heads: int = 9
    kv_heads: int = 3
    intermediate: int = 1536
    vocab: int = 49_152
    positions: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(Work):
    """A student and its teacher."""

    student: Path | Llama
    teacher: Path | Llama
    train: Path | None = None
    """None makes prompts of random words."""

    def settings(self, out: Path, endpoint: str, steps: int) -> dict[str, Any]:
        """Of the trainer, on top of the configuration; makes the student if it is not there."""
        student = _made(self.student)
        return {
            **self.step_settings(out, student, endpoint, steps),
            "data.train": str(self.train or _prompts(student)),
            **self.changes,
        }

    def teacher_words(self) -> list[str]:
        """Of the teacher's command line; makes the teacher if it is not there."""
        words = ["--config", str(self.teacher_config), "--model", str(_made(self.teacher))]
        return [*words, "--max-context", str(self.max_context)]


LAYERS = Llama(layers=24), Llama(layers=30)
PAIRS = {
    "playground": Pair(
        **PLAYGROUND.as_fields(),
        student=CHECKPOINTS / "student",
        teacher=CHECKPOINTS / "teacher",
        train=CHECKPOINTS / "train.jsonl",
    ),
    "smollm2": Pair(
        **LANGUAGE.as_fields(),
        student=LAYERS[0],
        teacher=LAYERS[1],
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Growing:
    """A pair for how time grows: it is told of less than it may take, along one axis at a time."""

    pair: Pair
    axes: Mapping[str, Sequence[int]]


STEADY = {
    "optim.learning_rate": 1e-12,
    "optim.final_learning_rate": 0.0,
    "drift.stop_in_flight": False,
}
"""A random student soon learns to end at once, and is unlike its teacher."""
GROWING = {
    "random": Growing(
        pair=Pair(
            config=LANGUAGE.config,
            teacher_config=LANGUAGE.teacher_config,
            rollouts=128,
            max_tokens=1024,
            max_context=1184,
            student=Llama(layers=2),
            teacher=Llama(layers=2),
            changes={
                **STEADY,
                "sampler.max_num_seqs": 128,
                "optim.micro_batch_tokens": 16_384,
            },
        ),
        axes={"rollouts": (8, 16, 32, 64, 128), "max_tokens": (64, 128, 256, 512, 1024)},
    ),
    "smollm2": Growing(
        pair=replace(
            PAIRS["smollm2"],
            rollouts=32,
            max_tokens=256,
            max_context=416,
            changes={**STEADY, "sampler.max_num_seqs": 32},
        ),
        axes={"rollouts": (8, 16, 32), "max_tokens": (64, 128, 256)},
    ),
}


def _made(model: Path | Llama) -> Path:
    """The folder of a checkpoint, made now if it is a shape and not there yet."""
    if isinstance(model, Path):
        return model
    path = FOLDER / f"llama-{model.layers}x{model.hidden}-{model.vocab}"
    if path.is_dir():
        return path
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _write(model, partial)
    partial.rename(path)
    return path


def _write(shape: Llama, folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.models import write_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    write_tokenizer(shape.vocab, folder)


def _prompts(student: Path) -> Path:
    """Lines of random words of the random student's tokenizer, beside it."""
    path = student / "prompts.jsonl"
    if not path.is_file():
        rng = np.random.default_rng(0)
        lengths = rng.integers(*PROMPT_WORDS, NUM_PROMPTS)
        texts = [" ".join(f"t{i}" for i in rng.integers(2, 4096, length)) for length in lengths]
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path
