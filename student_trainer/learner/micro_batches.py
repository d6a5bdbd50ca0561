"""How the rollouts of an update are cut into micro-batches, and what becomes of one that does not
fit into memory: from then on they are half as large, once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from student_trainer.errors import LearnerMemoryError, one_line
from student_trainer.learner.batch import padded_tokens, part_costs, split_micro
from student_trainer.records import Rollout

T = TypeVar("T")
REMEDY = (
    "student.gradient_checkpointing = true takes less for each token, so do a smaller budget and "
    "rollout.max_context; student.lora and optim.kind take less beside them"
)


class MicroBatches:
    """Those of one learner."""

    def __init__(
        self,
        max_tokens: int,
        device: torch.device,
        say: Callable[[str], None],
        *,
        alone: bool = True,
    ) -> None:
        """A person is told when they become smaller. They do not where this process is not
        `alone`: the others wait for the pass that failed."""
        self.max_tokens = max_tokens
        self._device = device
        self._say = say
        self._alone = alone
        self._is_halved = False
        self._last: Sequence[Rollout] = ()

    def split(self, rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
        """Those of an update."""
        return split_micro(rollouts, self.max_tokens, part_costs=part_costs(self._device))

    def noted(self, parts: Sequence[list[Rollout]]) -> Iterator[list[Rollout]]:
        """One after another."""
        for part in parts:
            self._last = part
            yield part

    def fitted(self, work: Callable[[], T], give_up: Callable[[], None]) -> T:
        """What `work` comes to, which goes through micro-batches.

        Where one does not fit into memory, what was done so far is given up and all of it done
        again in smaller ones; the gradient is the same. Raises LearnerMemoryError the second time,
        and for a rollout that does not fit alone.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(error)
            # Not before: the error's frames hold what was computed.
            give_up()
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _halve(self, error: RuntimeError) -> None:
        num_tokens, before = padded_tokens(self._last), self.max_tokens
        what = (
            f"a micro-batch of {len(self._last)} rollouts, {num_tokens} tokens with padding, does "
            f"not fit into memory ({one_line(error)[:200]})"
        )
        why = None
        if self._is_halved:
            why = "was halved before"
        elif len(self._last) == 1:
            why = "cannot be less than one rollout"
        elif not self._alone:
            why = "is halved by no process of several: set half of it"
        if why is not None:
            raise LearnerMemoryError(
                f"{what}, and optim.micro_batch_tokens, now {before}, {why}: {REMEDY}"
            ) from error
        self._is_halved = True
        # Half of a limit that nothing came near would change nothing.
        self.max_tokens = before // 2 if num_tokens > before // 2 else num_tokens // 2
        self._say(
            f"{what}: the update is done again, and optim.micro_batch_tokens is {self.max_tokens} "
            f"for the rest of this run (was {before}; the gradient is the same). Set it so, or "
            "student.gradient_checkpointing"
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU or of the CPU, for which PyTorch has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
