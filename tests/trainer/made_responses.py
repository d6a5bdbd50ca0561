"""Random responses of unequal length as inputs of the losses, for the laws of position weights.

Everything a weight reads is there: log-probs of three policies, entropies (with ties), ids of which
0 is a newline, bad events, and a mask with holes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses import Candidates, LossInputs

NEWLINE_ID = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Response:
    """One response, [T] each; `student_T` is the leaf that collects the gradient."""

    mask_T: Tensor
    bad_events_T: Tensor
    student_T: Tensor
    behavior_T: Tensor
    teacher_T: Tensor
    entropies_T: Tensor
    ids_T: Tensor

    def kept(self, keep_T: Tensor) -> Response:
        """Only the positions where `keep_T` is True, with a leaf of its own."""
        fields = {name: getattr(self, name)[keep_T] for name in self.__dataclass_fields__}
        fields["student_T"] = fields["student_T"].detach().requires_grad_()
        return Response(**fields)


def random_response(generator: torch.Generator, length: int, *, holes: bool = True) -> Response:
    """Float64; about one position in five masked, one id in four a newline."""
    student, behavior, teacher = (
        -4 * torch.rand(3, length, generator=generator, dtype=torch.float64)
    ).unbind()
    mask = torch.rand(length, generator=generator) < (0.8 if holes else 2.0)
    return Response(
        mask_T=mask,
        bad_events_T=torch.rand(length, generator=generator) < 0.3,
        student_T=student.requires_grad_(),
        behavior_T=behavior,
        teacher_T=teacher,
        entropies_T=torch.randint(0, 6, (length,), generator=generator).double() / 2,
        ids_T=torch.randint(0, 4, (length,), generator=generator),
    )


def random_responses(seed: int, lengths: Sequence[int] = (1, 9, 4, 23, 0, 6, 2)) -> list[Response]:
    generator = torch.Generator().manual_seed(seed)
    return [random_response(generator, length) for length in lengths]


def collate(responses: Sequence[Response], *, left: bool = False, spare: int = 2) -> LossInputs:
    """Padded on one side, with `spare` columns more than needed; padding is NaN, True or a newline.

    Padding may hold anything, so it holds what does most harm.
    """
    longest = max(len(r.mask_T) for r in responses) + spare

    def pad(name: str, fill: float) -> Tensor:
        rows = []
        for response in responses:
            values = getattr(response, name)
            filler = values.new_full((longest - len(values),), fill)
            rows.append(torch.cat([filler, values] if left else [values, filler]))
        return torch.stack(rows)

    return LossInputs(
        mask_BT=pad("mask_T", False),
        sampled=Candidates(
            student_logprobs_BTN=pad("student_T", torch.nan).unsqueeze(-1),
            behavior_logprobs_BTN=pad("behavior_T", torch.nan).unsqueeze(-1),
            teacher_logprobs_BTN=pad("teacher_T", torch.nan).unsqueeze(-1),
        ),
        student_entropies_BT=pad("entropies_T", torch.nan),
        response_ids_BT=pad("ids_T", NEWLINE_ID),
        bad_events_BT=pad("bad_events_T", True),
    )
