"""Exact-match accuracy of a playground model, with transformers' own generation."""

import torch
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from examples.playground.task import LINE_LENGTH, Problem, first_wrong_step, has_right_answer


def respond(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    *,
    greedy: bool,
) -> list[str]:
    """One response a problem, at temperature 1 unless greedy, up to two lines too long."""
    prompt_ids = tokenizer([problem.prompt for problem in problems], return_tensors="pt").input_ids
    num_lines = max(problem.num_rounds for problem in problems) + 2
    with torch.inference_mode():
        sequences = model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            do_sample=not greedy,
            temperature=None if greedy else 1.0,
            top_k=None if greedy else 0,
            max_new_tokens=LINE_LENGTH * num_lines,
            # The default one is copied whole for every token: more than half of the time.
            cache_implementation="static",
            disable_compile=True,
        )
    return tokenizer.batch_decode(sequences[:, prompt_ids.shape[1] :], skip_special_tokens=True)


def accuracy(problems: list[Problem], responses: list[str]) -> tuple[float, float]:
    """Fractions with the right answer, and with every step right as well."""
    pairs = list(zip(problems, responses, strict=True))
    answers = sum(has_right_answer(problem, response) for problem, response in pairs)
    solutions = sum(first_wrong_step(problem, response) is None for problem, response in pairs)
    return answers / len(pairs), solutions / len(pairs)
