"""The learner: the only one that touches the model and its optimiser.

It learns from rollouts, however they came; hands out its weights; and says what a token's log-prob
is under them, for whoever checks that they arrived. Knows no sampler, no teacher and no run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_trainer.diagnostics.step_report import LearnReport
from student_trainer.learner import continuations
from student_trainer.learner.adapter import Adapter
from student_trainer.learner.batch import (
    collate,
    recompute_behavior,
    split_updates,
)
from student_trainer.learner.export import export_bytes, export_weights, exported, tied_names
from student_trainer.learner.families import family_of, head_of
from student_trainer.learner.flipped import flipped
from student_trainer.learner.micro_batches import MicroBatches
from student_trainer.learner.optim import Optimizer
from student_trainer.learner.precision import lost_in_rounding, sample_of
from student_trainer.learner.sharding import (
    is_spread,
    most,
    own_share,
    stop_together,
)
from student_trainer.learner.student import student_forward
from student_trainer.learner.token_weights import TokenWeights
from student_trainer.losses.objective import (
    Divergence,
    StepSums,
    merge,
    needs_normalization,
    objective,
    step_scale,
    sum_over_processes,
)
from student_trainer.losses.supports import MatchingSupport
from student_trainer.losses.weight_choice import PositionWeight
from student_trainer.process.stopping import StopRequest
from student_trainer.records import AS_LEARNT, Rollout, WeightFormat
from student_trainer.saved_student import save_around, save_student
from teacher_wire.id_ranges import IdRanges


class Learner:
    """The student under training."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: Optimizer,
        *,
        divergence: Divergence,
        weights: Sequence[PositionWeight],
        epochs: int,
        updates_per_epoch: int,
        micro_batch_tokens: int,
        temperature: float,
        seed: int,
        dtype: torch.dtype = torch.float32,
        recomputes_behavior: bool = False,
        stop_ids: Collection[int] = (),
        stop: StopRequest | None = None,
        excluded_ids: IdRanges = (),
        copied_to: torch.dtype = torch.float32,
        adapter: Adapter | None = None,
        mass_outside: MatchingSupport | None = None,
        num_steps: int = 1,
        say: Callable[[str], None] = print,
    ) -> None:
        """`dtype`: of the arithmetic; the weights that are learnt are float32 whatever it is.
        `recomputes_behavior`: behavior log-probs are the learner's own, not the sampler's.
        `stop_ids` end the student's responses, besides what its generation config says.
        `excluded_ids` take no part in its distributions, and learn nothing as what is said; they
        may be set until the first step. `copied_to`: of the sampler's copy of the weights.
        `adapter`: what is learnt of a model that has one, all else being frozen. `mass_outside`:
        the support for which the divergence asks the mass outside. `num_steps`: of the run, for
        weights that change along it. `say`: to a
        person, where less fits into memory than `micro_batch_tokens`."""
        self._model = model
        self._tokenizer = tokenizer
        self._optimizer = optimizer
        self._divergence = divergence
        self._weights = weights
        self._epochs = epochs
        self._updates_per_epoch = updates_per_epoch
        self._temperature = temperature
        self._seed = seed
        self._dtype = dtype
        self._recomputes_behavior = recomputes_behavior
        self._stop_ids = stop_ids
        self._stop = stop or StopRequest()
        self.excluded_ids = excluded_ids
        self._copied_to = copied_to
        self._adapter = adapter
        self._mass_outside = mass_outside
        self._num_steps = num_steps
        self._device = next(model.parameters()).device
        self._micro_batches = MicroBatches(
            micro_batch_tokens, self._device, say, alone=not is_spread(model)
        )
        self.update_under_way: tuple[int, Sequence[Rollout]] = (0, ())
        """Which update of the step was begun last, from 1 on, and what it learns from."""

    @property
    def vocab_size(self) -> int:
        """Logits of the model."""
        return len(head_of(self._model).weight_VD)

    @property
    def lent_model(self) -> PreTrainedModel:
        """The model itself, for a sampler that only reads it, and never while anything is learnt.
        It has it back in the mode that it was in."""
        return self._model

    @property
    def sliding_window(self) -> int | None:
        """Tokens that an attention of the model sees at most; None for all of them."""
        window: int | None = getattr(
            self._model.config.get_text_config(decoder=True), "sliding_window", None
        )
        return window

    @property
    def checkpoint_bytes(self) -> int:
        """Of the weights and the optimiser's state, nearly all that a checkpoint holds."""
        moments = self._optimizer.bytes_per_parameter
        saved = self._learnt() if self._adapter else self._model.parameters()
        return sum(p.numel() * (p.element_size() + int(moments * p.requires_grad)) for p in saved)

    def learn(
        self, rollouts: Sequence[Rollout], step: int, noted: TokenWeights | None = None
    ) -> LearnReport:
        """All optimiser updates of one step. Of several processes each is given all rollouts, and
        computes its share of each update. `noted` is told the weights of tokens in the first pass.

        A request to stop, to one of several processes too, gives the step up as long as no update
        has changed the weights; from the first update on the others follow, because half of a step
        cannot be taken back. Raises NonFiniteLossError, LearnerMemoryError.
        """
        normalize = needs_normalization(self._weights)
        with self._may_give_up():
            rollouts = self._with_behavior(rollouts)
        all_sums: list[StepSums] = []
        grad_norms: list[float] = []
        before = self._sample()
        for epoch, update in self._updates(rollouts, step):
            is_first = not grad_norms
            notes = noted if epoch == 0 else None
            with self._may_give_up() if is_first else nullcontext():
                totals = self._micro_batches.fitted(
                    partial(
                        self._accumulate,
                        own_share(update),
                        progress=step / max(1, self._num_steps - 1),
                        gives_up=is_first,
                        noted=notes,
                    ),
                    self._model.zero_grad,
                )
            learning_rate = self._optimizer.learning_rate
            scale = step_scale(totals.weight_sum.item(), totals.num_tokens.item(), normalize)
            grad_norms.append(self._optimizer.step(scale))
            all_sums.append(totals)
        return LearnReport(
            **merge(all_sums).metrics(normalize=normalize),
            grad_norm=sum(grad_norms) / len(grad_norms),
            learning_rate=learning_rate,
            updates=len(grad_norms),
            lost_in_rounding=self._lost_since(before),
        )

    def _may_give_up(self) -> AbstractContextManager[None]:
        """Of several processes none leaves a pass that the others compute with it: they agree
        before each."""
        return nullcontext() if is_spread(self._model) else self._stop.may_give_up()

    def _sample(self) -> torch.Tensor | None:
        return sample_of(self._learnt()) if self._copied_to != torch.float32 else None

    def _learnt(self) -> Iterator[torch.nn.Parameter]:
        return (p for p in self._model.parameters() if p.requires_grad)

    def _lost_since(self, before: torch.Tensor | None) -> float | None:
        if before is None:
            return None
        return lost_in_rounding(before, sample_of(self._learnt()), self._copied_to)

    def _with_behavior(self, rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
        if not self._recomputes_behavior:
            return rollouts
        return recompute_behavior(
            self._model,
            rollouts,
            micro_batch_tokens=self._micro_batches.max_tokens,
            temperature=self._temperature,
            device=self._device,
            dtype=self._dtype,
            excluded_ids=self.excluded_ids,
            before_each=partial(stop_together, self._stop),
        )

    def _updates(
        self, rollouts: Sequence[Rollout], step: int
    ) -> Iterator[tuple[int, list[Rollout]]]:
        number = 0
        for epoch in range(self._epochs):
            seed = (self._seed, step, epoch)
            for update in split_updates(rollouts, self._updates_per_epoch, seed=seed):
                number += 1
                self.update_under_way = number, update
                yield epoch, update

    def _accumulate(
        self,
        rollouts: Sequence[Rollout],
        *,
        progress: float,
        gives_up: bool,
        noted: TokenWeights | None,
    ) -> StepSums:
        """The gradient of one update, added up over micro-batches, and its sums; `gives_up` where
        one of several processes is asked to stop meanwhile."""
        agree = partial(stop_together, self._stop) if gives_up else _go_on
        parts: list[StepSums] = []
        micros = self._micro_batches.split(rollouts)
        # Of a spread student every pass is one of all processes, which have more or fewer.
        num_passes = most(len(micros), self._device)
        for micro in self._micro_batches.noted(micros):
            agree()
            batch = collate(micro, self._device)
            gathered = batch.forward(
                self._model,
                temperature=self._temperature,
                dtype=self._dtype,
                excluded_ids=self.excluded_ids,
                only_counted=True,
                mass_outside=self._mass_outside,
            )
            inputs = batch.loss_inputs(gathered, progress)
            sums = objective(
                inputs,
                divergence=self._divergence,
                weights=self._weights,
                loss_weights_B=batch.loss_weights_B,
                noted=None if noted is None else partial(noted.note, micro),
            )
            sums.loss_sum.backward()
            parts.append(sums.detached())
        for _ in range(len(parts), num_passes):
            agree()
            self._pass_for_the_others()
        agree()
        return sum_over_processes(merge(parts))

    def _pass_for_the_others(self) -> None:
        """A forward and a backward pass that adds nothing."""
        ids = torch.zeros((1, 2), dtype=torch.long, device=self._device)
        gathered = student_forward(
            self._model,
            ids,
            torch.ones(1, dtype=torch.long, device=self._device),
            ids[:, 1:],
            torch.ones((1, 1), dtype=torch.bool, device=self._device),
            (),
            temperature=self._temperature,
            dtype=self._dtype,
        )
        (0.0 * gathered.logprobs_BT.sum()).backward()

    def logprobs(
        self, prompt_ids: NDArray[np.int32], token_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """[T] log-probs of a prompt's continuation at temperature 1, under the present weights."""
        (logprobs,) = self.logprobs_of([prompt_ids], [token_ids])
        return logprobs

    def logprobs_of(
        self, prompts: Sequence[NDArray[np.int32]], token_ids: Sequence[NDArray[np.int32]]
    ) -> list[NDArray[np.float32]]:
        """The same of several prompts in one pass, each [T] of its own continuation."""
        return continuations.logprobs(
            self._model, prompts, token_ids, dtype=self._dtype, excluded_ids=self.excluded_ids
        )

    def plain_logprobs(
        self, prompt_ids: NDArray[np.int32], token_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """The same of plain `model(ids).logits`: eager attention, evaluation mode, float32."""
        return continuations.plain_logprobs(
            self._model, prompt_ids, token_ids, excluded_ids=self.excluded_ids
        )

    def about(self) -> str:
        """Family, arithmetic, and what its config says of logits and attention; for a person."""
        dtype = str(self._dtype).removeprefix("torch.")
        adapted = " with an adapter" if self._adapter else ""
        return f"{family_of(self._model)}{adapted}; it computes in {dtype}"

    def changed(self) -> AbstractContextManager[None]:
        """Every weight that is learnt different within, the very same bits behind it."""
        return flipped(self._model) if self._adapter is None else self._adapter.changed()

    @property
    def name_prefix(self) -> str:
        """Of the base model: checkpoints have their names with or without it."""
        return f"{self._model.base_model_prefix}."

    def weights(self, written: WeightFormat = AS_LEARNT) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors for a sampler to load, each once."""
        return exported(self._model, written, self._adapter)

    def tied_names(self, written: WeightFormat = AS_LEARNT) -> dict[str, str]:
        """Names that are not among them, and which other one each is again (a tied head)."""
        return tied_names(self._model, written)

    def export_bytes(self, written: WeightFormat = AS_LEARNT) -> int:
        """Of the tensors of `weights`."""
        return export_bytes(self._model, written, self._adapter)

    def save(self, folder: Path | None) -> None:
        """The student in Hugging Face format, or its adapter in peft's, with its tokenizer.

        Of several processes one writes; the others, with no folder, give it their parts.
        """
        if self._adapter is not None:
            tensors = self._adapter.tensors()
            save_weights: Callable[[Path], object] = partial(self._adapter.save, tensors=tensors)
        elif is_spread(self._model):
            parts = exported(self._model, AS_LEARNT)
            whole = {name: tensor for name, tensor in parts if folder is not None}
            save_weights = partial(self._model.save_pretrained, state_dict=whole)
        else:
            save_weights = self._model.save_pretrained
        if folder is not None:
            save_student(
                self._model, self._tokenizer, folder, stop_ids=self._stop_ids, save=save_weights
            )

    def save_what_can_be(self, folder: Path) -> None:
        """The bare weights, and what of the rest can be written: for when `save` has failed."""
        if self._adapter is None:
            export_weights(self._model, folder, AS_LEARNT)
        else:
            self._adapter.save(folder, self._adapter.tensors())
        save_around(self._model, self._tokenizer, folder)

    def state(self) -> dict[str, Any]:
        """What a resumed learner needs beside the weights."""
        return {"optimizer": self._optimizer.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from there, given a model with the weights of the same checkpoint."""
        self._optimizer.load(state["optimizer"])


def _go_on() -> None:
    """Whatever was asked."""
