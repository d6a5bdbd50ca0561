"""What every loss must obey, tried on made policies over a small vocabulary.

Shape legend: B = sequences, T = response positions, K = teacher top-k, J = student top-k,
V = vocabulary. Nats. A loss is given what it says that it needs and nothing more. The laws:

  one number a position     [B, T], of a floating type
  inputs left alone         no tensor that it is given is written to
  finite                    value and gradient, at log-probs of -10,000 too
  nil outside the mask      0.0 there, and deleting a masked position changes nothing
  gradient to the student   from the loss to the student, and to nothing else
  split                     the same sum, whichever way the batch is split
  not negative, nought at equality   of a divergence

Both packages' own losses are tested with these. Nothing here knows which loss it tries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from student_trainer.settings.loss import MatchingSupport, Needs

from .declared import LossKind
from .inputs import Candidates, LossInputs
from .objective import Divergence

FAR_NATS = 1e4
"""How unlikely a token is at the most."""
TOLERANCE = 1e-6
"""Of sums and signs, relative to the largest number they are made of, or nats."""
NUM_SEEDS = 4


class LawBrokenError(ValueError):
    """A loss breaks a law; the message names it, the case and the number seen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Policies:
    """Three policies over the whole vocabulary, who sampled what, and what counts."""

    name: str
    """What is special about the case, in the words of an error."""
    student_BTV: Tensor
    """Log-probs; the leaf that collects the gradient."""
    behavior_BTV: Tensor
    teacher_BTV: Tensor
    sampled_BT: Tensor
    mask_BT: Tensor
    k: int
    j: int

    def inputs(self, needs: Needs) -> LossInputs:
        """As a batch would hand them over to a loss with these needs."""
        return inputs_of(
            self.student_BTV,
            self.behavior_BTV,
            self.teacher_BTV,
            self.sampled_BT,
            teacher_ids_BTK=self.teacher_BTV.topk(self.k).indices,
            student_ids_BTJ=self.behavior_BTV.topk(self.j).indices,
            mask_BT=self.mask_BT,
            needs=needs,
        )

    def part(self, row: int, *, kept: bool) -> Policies:
        """One sequence alone, with a leaf of its own; `kept`: without its masked positions."""
        columns = self.mask_BT[row] if kept else slice(None)
        names = ("student_BTV", "behavior_BTV", "teacher_BTV", "sampled_BT", "mask_BT")
        rows = {name: getattr(self, name)[row : row + 1][:, columns].detach() for name in names}
        return replace(self, **rows | {"student_BTV": rows["student_BTV"].requires_grad_()})


def inputs_of(
    student_BTV: Tensor,
    behavior_BTV: Tensor,
    teacher_BTV: Tensor,
    sampled_BT: Tensor,
    *,
    teacher_ids_BTK: Tensor,
    student_ids_BTJ: Tensor,
    mask_BT: Tensor,
    bad_events_BT: Tensor | None = None,
    needs: Needs | None = None,
    mass_outside: MatchingSupport | None = "teacher_topk",
) -> LossInputs:
    """Loss inputs from the log-probs of three policies over all of V; without `needs`, all, and the
    student's mass outside of one support."""
    sampled_BT1 = sampled_BT.unsqueeze(-1)
    has_teacher = needs is None or needs.teacher_k > 0
    has_student = needs is None or needs.student_topk

    def listed(ids: Tensor, *, in_teacher: bool, in_student: bool, behavior: bool) -> Candidates:
        return Candidates(
            student_logprobs_BTN=student_BTV.gather(-1, ids),
            teacher_logprobs_BTN=teacher_BTV.gather(-1, ids),
            behavior_logprobs_BTN=behavior_BTV.gather(-1, ids) if behavior else None,
            in_teacher_topk_BTN=_found(ids, teacher_ids_BTK) if in_teacher else None,
            in_student_topk_BTN=_found(ids, student_ids_BTJ) if in_student else None,
        )

    at_teacher = needs is None or needs.behavior_at_teacher_topk
    teacher_topk = student_topk = None
    if has_teacher:
        teacher_topk = listed(
            teacher_ids_BTK, in_teacher=False, in_student=has_student, behavior=at_teacher
        )
    if has_student:
        student_topk = listed(
            student_ids_BTJ, in_teacher=has_teacher, in_student=False, behavior=True
        )
    return LossInputs(
        mask_BT=mask_BT,
        sampled=listed(sampled_BT1, in_teacher=has_teacher, in_student=has_student, behavior=True),
        teacher_topk=teacher_topk,
        student_topk=student_topk,
        teacher_entropies_BT=(
            _entropies(teacher_BTV)
            if needs is None or "entropies" in needs.teacher_columns
            else None
        ),
        student_entropies_BT=_entropies(student_BTV),
        student_log_outside_BT=log_outside(
            student_BTV,
            sampled_BT1,
            teacher_ids_BTK,
            student_ids_BTJ,
            support=mass_outside if needs is None else needs.mass_outside,
        ),
        response_ids_BT=sampled_BT,
        bad_events_BT=bad_events_BT,
    )


def log_outside(
    student_BTV: Tensor,
    sampled_BT1: Tensor,
    teacher_ids_BTK: Tensor,
    student_ids_BTJ: Tensor,
    *,
    support: MatchingSupport | None,
) -> Tensor | None:
    """[B, T]: the log of the student's mass outside a support, -inf where nothing is there."""
    if support is None:
        return None
    listed = student_ids_BTJ if support == "student_topk_and_sampled" else teacher_ids_BTK
    ids = listed if support == "teacher_topk" else torch.cat([listed, sampled_BT1], dim=-1)
    inside_BTV = torch.zeros_like(student_BTV, dtype=torch.bool).scatter(-1, ids, True)
    all_BT = inside_BTV.all(dim=-1)
    # A row of -inf would have a gradient of NaN.
    outside_BTV = student_BTV.masked_fill(inside_BTV & ~all_BT.unsqueeze(-1), -torch.inf)
    return outside_BTV.logsumexp(dim=-1).masked_fill(all_BT, -torch.inf)


def _found(ids_BTN: Tensor, others_BTM: Tensor) -> Tensor:
    return (ids_BTN.unsqueeze(-1) == others_BTM.unsqueeze(-2)).any(dim=-1)


def _entropies(logprobs_BTV: Tensor) -> Tensor:
    logprobs_BTV = logprobs_BTV.detach()
    return -(logprobs_BTV.exp() * logprobs_BTV).sum(dim=-1)


def cases(needs: Needs) -> Iterator[Policies]:
    """Ordinary policies, one token alone, equal ones, and such as are sure of different tokens."""
    k = max(3, needs.teacher_k)
    size, j = k + 8, 4
    for seed in range(NUM_SEEDS):
        generator = torch.Generator().manual_seed(seed)
        shape = (3, 6, size) if seed else (1, 1, size)
        behavior, teacher, step = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        mask_BT = torch.rand(shape[:2], generator=generator) < 0.7
        mask_BT[:, 0] = True
        if shape[0] > 1:
            mask_BT[-1] = False
        ordinary = Policies(
            name="one token alone" if shape[0] == 1 else f"random policies, seed {seed}",
            student_BTV=_leaf(2 * behavior + 0.5 * step),
            behavior_BTV=(2 * behavior).log_softmax(-1),
            teacher_BTV=(2 * teacher).log_softmax(-1),
            sampled_BT=torch.randint(size, shape[:2], generator=generator),
            mask_BT=mask_BT,
            k=k,
            j=j,
        )
        yield ordinary
        yield _far(ordinary, behavior.argmax(-1), teacher.argmax(-1), step.argmax(-1))


def _leaf(logits_BTV: Tensor) -> Tensor:
    return logits_BTV.log_softmax(-1).detach().requires_grad_()


def _far(like: Policies, *sure_of_BT: Tensor) -> Policies:
    """The same, each policy sure of a token and every other one 10,000 nats away; float32."""

    def policy(ids_BT: Tensor) -> Tensor:
        logits_BTV = torch.full(like.teacher_BTV.shape, -FAR_NATS)
        return logits_BTV.scatter(-1, ids_BT.unsqueeze(-1), 0.0).log_softmax(-1)

    behavior_BTV, teacher_BTV, student_BTV = map(policy, sure_of_BT)
    return replace(
        like,
        name=f"log-probs of {-FAR_NATS:.0f}",
        student_BTV=student_BTV.requires_grad_(),
        behavior_BTV=behavior_BTV,
        teacher_BTV=teacher_BTV,
    )


def check_laws(loss: Divergence, *, kind: LossKind, needs: Needs) -> None:
    """Tries a loss. Raises LawBrokenError at the first law that it breaks."""
    made, steepest = list(cases(needs)), 0.0
    for case in made:
        total, gradient_BTV, _ = _tried(loss, case, needs)
        steepest = max(steepest, gradient_BTV.abs().max().item())
        _check_split(loss, case, needs, total, gradient_BTV)
    if steepest == 0.0:
        raise LawBrokenError(
            "gradient to the student: its log-probs have a gradient of 0 in every case"
        )
    if kind == "divergence":
        for case in made:
            _check_divergence(loss, case, needs)


def _broken(law: str, case: Policies, seen: str) -> None:
    raise LawBrokenError(f"{law}: {seen}, with {case.name}")


def _tried(loss: Divergence, case: Policies, needs: Needs) -> tuple[float, Tensor, Tensor]:
    """Sum over what counts, its gradient, and the loss [B, T]; the laws of a single call."""
    inputs = case.inputs(needs)
    before = [(name, tensor, tensor.detach().clone()) for name, tensor in _tensors(inputs)]
    try:
        loss_BT = loss(inputs)
    except Exception as error:
        raise LawBrokenError(
            f"it raised {type(error).__name__}: {error}, with {case.name} (what it does not "
            "declare to need is None)"
        ) from error
    if not isinstance(loss_BT, Tensor):
        _broken("one number a position", case, f"it returned a {type(loss_BT).__name__}")
    if loss_BT.shape != case.mask_BT.shape or not loss_BT.is_floating_point():
        shape = tuple(case.mask_BT.shape)
        seen = f"{loss_BT.dtype} of shape {tuple(loss_BT.shape)} for a mask of shape {shape}"
        _broken("one number a position", case, seen)
    for name, tensor, copy in before:
        if not torch.equal(tensor.detach(), copy):
            _broken("inputs left alone", case, f"{name} was written to")
    _check_leaves(loss_BT, case)
    (gradient_BTV,) = torch.autograd.grad(loss_BT.sum(), case.student_BTV, retain_graph=True)
    for what, values in (("the loss", loss_BT), ("the gradient", gradient_BTV)):
        bad = ~values.isfinite()
        bad_BT = bad if bad.ndim == 2 else bad.any(dim=-1)
        if num_bad := int(bad_BT.sum()):
            example = values[bad][0].item()
            seen = f"{what} is {example} at {num_bad} of {bad_BT.numel()} positions"
            _broken("finite", case, seen)
    outside = loss_BT.detach()[~case.mask_BT].abs()
    if outside.numel() and (worst := outside.max().item()) > TOLERANCE:
        seen = f"{worst:.6g} at a masked position; torch.where(inputs.mask_BT, loss, 0.0)"
        _broken("nil outside the mask", case, seen)
    return loss_BT.sum().item(), gradient_BTV, loss_BT.detach()


def _tensors(inputs: LossInputs) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the inputs by its name."""
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, Tensor):
            yield field.name, value
        elif isinstance(value, Candidates):
            for inner in fields(value):
                tensor = getattr(value, inner.name)
                if tensor is not None:
                    yield f"{field.name}.{inner.name}", tensor


def _check_leaves(loss_BT: Tensor, case: Policies) -> None:
    """The student is what the loss has a gradient to, and the only thing."""
    if not loss_BT.requires_grad:
        _broken("gradient to the student", case, "the loss has none (detached?)")
    pending, seen = [loss_BT.grad_fn], set()
    leaves: list[Tensor] = []
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        pending += [below for below, _ in node.next_functions]
    others = [leaf for leaf in leaves if leaf is not case.student_BTV]
    if others:
        shape = tuple(others[0].shape)
        _broken("gradient to the student only", case, f"it also has one to a tensor of {shape}")
    if not leaves:
        _broken("gradient to the student", case, "the loss does not depend on it")


def _check_split(
    loss: Divergence, case: Policies, needs: Needs, total: float, gradient_BTV: Tensor
) -> None:
    """Sequence by sequence, and each without its masked positions: the same sum and gradient."""
    for law, kept in (
        ("the same sum when the batch is split", False),
        ("nil outside the mask", True),
    ):
        parts, scale, gap = 0.0, 0.0, 0.0
        for row, mask_T in enumerate(case.mask_BT):
            if kept and not mask_T.any():
                continue
            part = case.part(row, kept=kept)
            part_sum, part_gradient, part_loss = _tried(loss, part, needs)
            parts += part_sum
            scale += part_loss.abs().sum().item()
            whole = gradient_BTV[row : row + 1][:, mask_T if kept else slice(None)]
            gap = max(gap, ((whole - part_gradient).abs() / (1.0 + whole.abs())).max().item())
        if abs(parts - total) > TOLERANCE * max(1.0, scale):
            what = "without its masked positions" if kept else "by sequences"
            _broken(law, case, f"{total:.6g} together, {parts:.6g} {what}")
        if gap > TOLERANCE:
            _broken(law, case, f"the gradient differs by {gap:.3g}")


def _check_divergence(loss: Divergence, case: Policies, needs: Needs) -> None:
    """Never negative; 0 where all policies are one and every list is the whole vocabulary."""
    loss_BT = _tried(loss, case, needs)[2]
    lowest, highest = loss_BT.min().item(), loss_BT.abs().max().item()
    if lowest < -TOLERANCE * max(1.0, highest):
        _broken("a divergence is not negative", case, f"{lowest:.6g}")
    size = case.teacher_BTV.shape[-1]
    equal = replace(
        case,
        name=f"student and teacher equal, {case.name}",
        student_BTV=case.teacher_BTV.detach().clone().requires_grad_(),
        behavior_BTV=case.teacher_BTV,
        k=size,
        j=size,
    )
    worst = _tried(loss, equal, needs)[2].abs().max().item()
    if worst > TOLERANCE:
        _broken("a divergence is nought at equality", equal, f"{worst:.6g}")
