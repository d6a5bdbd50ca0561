"""Make the playground's teacher, student and problem files from nothing.

    python -m examples.playground.build --out examples/playground/checkpoints --seed 0

The teacher is trained on whole problems of every length up to TRAINING_ROUNDS. The student is
cold-started on short chains only, up to STUDENT_LINES lines, and then gets so brief a taste of
whole problems that it is unsure beyond those lines rather than surely wrong: reverse KL learns
nothing from a right token that the student holds impossible. The near student is the same one after
a few more steps on whole problems; the study's high-compatibility pair begins with it.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from transformers import AutoTokenizer, Qwen3ForCausalLM

from examples.playground.evaluation import accuracy, respond
from examples.playground.task import TRAINING_ROUNDS, Problem, draw_split
from examples.playground.training import Stage, build_model, train
from examples.playground.vocabulary import save_tokenizer

NUM_TRAINING_PROBLEMS = 4096
NUM_HELDOUT_PROBLEMS = 256

STUDENT_LINES = 5
"""Solution lines that the student is cold-started on; the teacher knows TRAINING_ROUNDS."""

WHOLE = {num_rounds: (num_rounds, None) for num_rounds in range(1, TRAINING_ROUNDS + 1)}
"""Lessons on whole problems, by number of rounds."""

CUT = {num_lines: (TRAINING_ROUNDS, num_lines) for num_lines in range(1, STUDENT_LINES + 1)}
"""Lessons on the first lines of problems of the training length, by number of lines."""

TEACHER_RUNS = (
    (
        Stage(num_steps=150, lessons=(WHOLE[1], WHOLE[2], WHOLE[3])),
        Stage(num_steps=350, lessons=(*WHOLE.values(), *[WHOLE[TRAINING_ROUNDS]] * 30)),
    ),
)
"""Each run has optimizers and a learning-rate schedule of its own."""

STUDENT_RUNS = (
    (
        Stage(num_steps=150, lessons=(WHOLE[1], WHOLE[2], CUT[2], CUT[3])),
        Stage(num_steps=100, lessons=(WHOLE[1], WHOLE[2], CUT[4], CUT[5], CUT[5])),
    ),
    (Stage(num_steps=20, lessons=(WHOLE[TRAINING_ROUNDS],)),),
)

NEAR_RUNS = ((Stage(num_steps=30, lessons=(WHOLE[TRAINING_ROUNDS],)),),)
"""What the near student gets on top of the student."""

RUNS = {"teacher": TEACHER_RUNS, "student": STUDENT_RUNS, "student-near": NEAR_RUNS}
SEED_OFFSETS = {"teacher": 0, "student": 0, "student-near": 200}

console = Console()


def build_checkpoint(name: str, path: Path, seed: int) -> Qwen3ForCausalLM:
    """Train one of RUNS and save it with its tokenizer; the near student starts as the student."""
    if name == "teacher":
        model = build_model(num_layers=3, hidden_size=128, seed=seed)
    elif name == "student":
        model = build_model(num_layers=2, hidden_size=128, seed=seed + 1)
    else:
        model = Qwen3ForCausalLM.from_pretrained(path.with_name("student"))
    with Progress(console=console) as progress:
        for index, stages in enumerate(RUNS[name]):
            bar = progress.add_task(name, total=sum(stage.num_steps for stage in stages))

            def report(step: int, loss: float, bar: TaskID = bar) -> None:
                progress.update(bar, completed=step, description=f"{name}, loss {loss:.4f}")

            train(model, stages, seed=seed + SEED_OFFSETS[name] + 100 * index, report=report)
    model.save_pretrained(path)
    save_tokenizer(path)
    return model


def write_problems(path: Path, problems: list[Problem]) -> None:
    """One JSON object a line: prompt, answer, canonical solution, num_rounds."""
    with path.open("w", encoding="utf-8") as lines:
        for problem in problems:
            record = {
                "prompt": problem.prompt,
                "answer": problem.answer,
                "solution": problem.solution,
                "num_rounds": problem.num_rounds,
            }
            lines.write(json.dumps(record) + "\n")


def write_splits(out: Path, seed: int) -> list[Problem]:
    """Write train.jsonl and heldout.jsonl, disjoint whatever the seed; returns the held-out."""
    rng = random.Random(seed)
    training = draw_split(rng, NUM_TRAINING_PROBLEMS, TRAINING_ROUNDS, heldout=False)
    heldout = draw_split(rng, NUM_HELDOUT_PROBLEMS, TRAINING_ROUNDS, heldout=True)
    write_problems(out / "train.jsonl", training)
    write_problems(out / "heldout.jsonl", heldout)
    return heldout


def measure(path: Path, model: Qwen3ForCausalLM, problems: list[Problem]) -> dict[str, float]:
    """Fractions of problems answered right, greedily and at temperature 1."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    greedy, _ = accuracy(problems, respond(model, tokenizer, problems, greedy=True))
    sampled, _ = accuracy(problems, respond(model, tokenizer, problems, greedy=False))
    return {"greedy_accuracy": greedy, "sampled_accuracy": sampled}


def build_and_measure(name: str, out: Path, seed: int, heldout: list[Problem]) -> None:
    """Build one checkpoint, then print and record its wall time (s) and held-out accuracy."""
    path = out / name
    start = time.perf_counter()
    model = build_checkpoint(name, path, seed)
    record = {
        "seed": seed,
        "num_parameters": model.num_parameters(),
        "train_s": round(time.perf_counter() - start),
        "num_heldout": len(heldout),
        **measure(path, model, heldout),
    }
    (path / "build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(name, record)


def main() -> None:
    """Write the problem files and build what --only asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--only", choices=tuple(RUNS), help="build just this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="1 is best on a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    heldout = write_splits(arguments.out, arguments.seed)
    for name in (arguments.only,) if arguments.only else RUNS:
        build_and_measure(name, arguments.out, arguments.seed, heldout)


if __name__ == "__main__":
    main()
