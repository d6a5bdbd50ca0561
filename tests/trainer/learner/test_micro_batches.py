"""What becomes of an update for which there is not enough memory.

The memory is a number of tokens above which a forward or a backward pass raises what PyTorch
raises; all else is real. Run: python -m pytest tests/trainer/learner/test_micro_batches.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from student_trainer.errors import LearnerMemoryError
from student_trainer.learner.batch import Batch
from student_trainer.learner.learner import Learner
from student_trainer.learner.micro_batches import MicroBatches, is_out_of_memory
from student_trainer.learner.student import Gathered
from student_trainer.records import Rollout
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import tiny_student
from tests.trainer.made_rollouts import random_rollout

PROMPT, LONGEST = 3, 12


def rollouts() -> list[Rollout]:
    """Eight, 6 to 15 tokens long."""
    rng = np.random.default_rng(0)
    lengths = (3, 12, 5, 7, 9, 11, 4, 6)
    return [random_rollout(rng, num_prompt=PROMPT, num_response=n) for n in lengths]


def out_of_cuda() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def out_of_cpu() -> RuntimeError:
    """The real one: no machine has a petabyte."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    return caught.value


class Memory:
    """For so many tokens at once; remembers the sizes of all passes."""

    def __init__(self, max_tokens: int, error: RuntimeError, *, in_backward: bool = False) -> None:
        self.max_tokens, self.error, self.in_backward = max_tokens, error, in_backward
        self.sizes: list[int] = []

    def bounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = Batch.forward

        def bounded(batch: Batch, *arguments: Any, **named: Any) -> Gathered:
            self.sizes.append(batch.input_ids_BS.numel())
            if self.sizes[-1] <= self.max_tokens:
                return forward(batch, *arguments, **named)
            if not self.in_backward:
                raise self.error
            gathered = forward(batch, *arguments, **named)
            # The loss of these learners is of the teacher's top-k.
            gathered.logprobs_at_BTN[0].register_hook(self._fail)
            return gathered

        monkeypatch.setattr(Batch, "forward", bounded)

    def _fail(self, _: torch.Tensor) -> None:
        raise self.error


def learner(max_tokens: int, said: list[str], **changes: Any) -> Learner:
    return learner_of(tiny_student(), micro_batch_tokens=max_tokens, say=said.append, **changes)


def weights(made: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made.weights()}


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(some[name], tensor) for name, tensor in others.items())


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("error", [out_of_cuda, out_of_cpu])
def test_an_update_that_does_not_fit_is_done_again_in_halves(
    monkeypatch: pytest.MonkeyPatch, error: Any, in_backward: bool
) -> None:
    """As if the half had been set: to the last bit, over two steps of two updates."""
    said: list[str] = []
    expected = learner(30, said, updates_per_epoch=2)
    for step in range(2):
        expected.learn(rollouts(), step)
    assert said == []
    memory = Memory(30, error(), in_backward=in_backward)
    memory.bounds(monkeypatch)
    halved = learner(60, said, updates_per_epoch=2)
    reports = [halved.learn(rollouts(), step) for step in range(2)]
    assert len(said) == 1
    assert same(weights(halved), weights(expected))
    assert [report.updates for report in reports] == [2, 2]
    line = said[0]
    assert re.match(r"a micro-batch of \d rollouts, \d+ tokens with padding, does not fit", line)
    assert "optim.micro_batch_tokens is 30 for the rest of this run (was 60;" in line
    assert sum(size > 30 for size in memory.sizes) == 1


def test_the_gradient_of_what_did_fit_before_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    expected = learner(22, said)
    expected.learn(rollouts(), 0)
    memory = Memory(22, out_of_cuda())
    memory.bounds(monkeypatch)
    halved = learner(45, said)
    halved.learn(rollouts(), 0)
    # The shortest fit, and had a gradient when the next did not.
    assert memory.sizes[:2] == [14, 30]
    assert len(said) == 1
    assert same(weights(halved), weights(expected))


def test_half_of_a_limit_that_nothing_came_near_is_half_of_what_did_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    Memory(60, out_of_cuda()).bounds(monkeypatch)
    learner(100_000, said).learn(rollouts(), 0)
    assert f"optim.micro_batch_tokens is {8 * (PROMPT + LONGEST) // 2} for the rest" in said[0]


def failure(
    monkeypatch: pytest.MonkeyPatch, memory: int, micro_batch_tokens: int, said: list[str]
) -> str:
    Memory(memory, out_of_cuda()).bounds(monkeypatch)
    made = learner(micro_batch_tokens, said)
    before = weights(made)
    with pytest.raises(LearnerMemoryError) as error:
        made.learn(rollouts(), 0)
    assert same(weights(made), before)
    assert "CUDA out of memory. Tried to allocate" in str(error.value)
    assert "student.gradient_checkpointing = true takes less" in str(error.value)
    return str(error.value)


def test_the_second_time_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    line = failure(monkeypatch, 20, 60, said)
    assert len(said) == 1
    assert "and optim.micro_batch_tokens, now 30, was halved before: " in line


def test_a_rollout_that_does_not_fit_alone_is_a_typed_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    line = failure(monkeypatch, 5, 1, said)
    assert said == []
    assert line.startswith("a micro-batch of 1 rollouts, 6 tokens with padding, does not fit")
    assert "and optim.micro_batch_tokens, now 1, cannot be less than one rollout: " in line


def test_of_several_processes_none_does_its_update_again_alone() -> None:
    said: list[str] = []
    micro_batches = MicroBatches(60, torch.device("cpu"), said.append, alone=False)

    def work() -> None:
        for _ in micro_batches.noted(micro_batches.split(rollouts())):
            raise out_of_cuda()

    with pytest.raises(LearnerMemoryError, match=r"now 60, is halved by no process of several"):
        micro_batches.fitted(work, lambda: None)
    assert said == []


@pytest.mark.parametrize("errors", [[RuntimeError("shapes differ"), ValueError("no")]])
def test_another_error_is_what_it_is(
    monkeypatch: pytest.MonkeyPatch, errors: Sequence[Exception]
) -> None:
    for error in errors:
        Memory(30, error).bounds(monkeypatch)  # type: ignore[arg-type]
        with pytest.raises(type(error), match=str(error)):
            learner(60, []).learn(rollouts(), 0)


def test_what_is_out_of_memory() -> None:
    assert is_out_of_memory(out_of_cuda())
    assert is_out_of_memory(out_of_cpu())
    assert not is_out_of_memory(RuntimeError("no"))
