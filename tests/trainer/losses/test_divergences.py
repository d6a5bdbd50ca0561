"""Values and gradients of the divergences: pytest tests/trainer/losses/test_divergences.py"""

import math

import pytest
import torch

from student_trainer.learner.head import Head
from student_trainer.learner.head_logprobs import head_logprobs
from student_trainer.losses.divergences import (
    GeneralizedJSD,
    forward_kl,
    generalized_jsd,
    local_support_matching,
    reverse_kl_monitor,
    truncated_reverse_kl,
)
from student_trainer.losses.entropy_aware import EntropyAwareKL, entropy_aware_kl
from student_trainer.losses.policy_gradients import (
    SampledReverseKL,
    sampled_reverse_kl,
    support_reverse_kl,
)
from tests.trainer.losses.loss_cases import case

torch.set_num_threads(1)


def row(*values: float, grad: bool = False) -> torch.Tensor:
    """One sequence of one-number positions, [1, T], float64."""
    return torch.tensor([values], dtype=torch.float64, requires_grad=grad)


def support(*values: float, grad: bool = False) -> torch.Tensor:
    """One position with a support of the given values, [1, 1, K], float64."""
    return torch.tensor([[values]], dtype=torch.float64, requires_grad=grad)


def sampled(ratio: float, advantage: float, **clips: float | None) -> tuple[float, float]:
    """Value and gradient of the sampled surrogate at one token with this ratio and advantage."""
    behavior = row(-3.0)
    student = row(-3.0 + math.log(ratio), grad=True)
    settings = {"clip_epsilon": 0.2, "dual_clip": 3.0, **clips}
    loss = sampled_reverse_kl(student, behavior, behavior + advantage, **settings)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    return loss.item(), grad.item()


def test_support_matching_reproduces_the_golden_value_and_gradient() -> None:
    student, teacher = support(1.0, 1.5, 0.2, grad=True), support(2.0, 1.0, 0.0)
    loss = local_support_matching(student, teacher)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss.shape == (1, 1)
    assert loss.item() == pytest.approx(0.249147, abs=1e-6)
    assert grad.flatten().tolist() == pytest.approx([-0.313847, 0.280824, 0.033023], abs=1e-6)


def test_support_matching_clamps_each_log_ratio() -> None:
    student, teacher = support(0.5, 0.5).log(), support(0.9, 0.1).log()
    exact = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    clamped = 0.5 * math.log(0.5 / 0.9) + 0.5 * 1.0
    assert local_support_matching(student, teacher).item() == pytest.approx(exact)
    assert local_support_matching(student, teacher, clip_log_ratio=1.0).item() == pytest.approx(
        clamped
    )


def test_support_of_one_token_costs_nothing() -> None:
    student = support(-4.0, grad=True)
    loss = local_support_matching(student, support(-0.1))
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss.sum(), student)[0].item() == 0.0


def test_truncated_form_is_negative_when_the_student_leaves_the_support() -> None:
    student, teacher = support(0.1, 0.1).log(), support(0.4, 0.4).log()
    head = 0.2 * math.log(0.1 / 0.4)
    tail = 0.8 * math.log(0.8 / 0.2)
    assert truncated_reverse_kl(student, teacher, tail=False).item() == pytest.approx(head)
    assert head < 0
    assert truncated_reverse_kl(student, teacher, tail=True).item() == pytest.approx(head + tail)
    assert local_support_matching(student, teacher).item() == pytest.approx(0.0, abs=1e-12)


def test_tail_gradient_stays_finite_at_full_mass() -> None:
    student = torch.tensor([[[0.0, -40.0]]], requires_grad=True)
    loss = truncated_reverse_kl(student, support(0.5, 0.4).log().float(), tail=True)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss.item() == pytest.approx(math.log(1 / 0.5), abs=1e-5)
    assert grad.isfinite().all()


def test_forward_kl_counts_the_mass_outside_the_support_as_one_class() -> None:
    student, teacher = support(0.1, 0.2).log(), support(0.5, 0.3).log()
    expected = 0.5 * math.log(5) + 0.3 * math.log(1.5) + 0.2 * math.log(0.2 / 0.7)
    assert forward_kl(student, teacher).item() == pytest.approx(expected)
    assert forward_kl(teacher, teacher).item() == pytest.approx(0.0, abs=1e-12)


def test_a_sure_and_wrong_student_learns_from_forward_but_not_from_reverse_kl() -> None:
    logits = torch.tensor([[[12.0, 0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    teacher = support(1e-4, 0.9998, 1e-4).log()
    (forward,) = torch.autograd.grad(forward_kl(logits.log_softmax(-1), teacher).sum(), logits)
    (reverse,) = torch.autograd.grad(local_support_matching(logits, teacher).sum(), logits)
    assert forward[0, 0, 1].item() == pytest.approx(-0.9998, abs=1e-4)
    assert reverse.abs().max().item() < 1e-3


def test_forward_kl_without_a_tail_renormalises_the_teacher_only() -> None:
    student, teacher = support(0.1, 0.2).log(), support(0.5, 0.3).log()
    expected = 5 / 8 * math.log(5 / 8 / 0.1) + 3 / 8 * math.log(3 / 8 / 0.2)
    assert forward_kl(student, teacher, tail=False).item() == pytest.approx(expected)
    at_home = forward_kl(support(5 / 8, 3 / 8).log(), teacher, tail=False)
    assert at_home.item() == pytest.approx(0.0, abs=1e-12)


def test_jsd_is_the_mean_gap_to_the_mixture() -> None:
    student, teacher = support(0.1, 0.2).log(), support(0.5, 0.3).log()
    p, q = [0.1, 0.2, 0.7], [0.5, 0.3, 0.2]
    m = [0.25 * b + 0.75 * a for a, b in zip(p, q, strict=True)]
    expected = sum(
        0.25 * b * math.log(b / c) + 0.75 * a * math.log(a / c)
        for a, b, c in zip(p, q, m, strict=True)
    )
    assert generalized_jsd(student, teacher, beta=0.25).item() == pytest.approx(expected, abs=1e-9)
    assert generalized_jsd(teacher, teacher, beta=0.25).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.5, 0.99])
def test_jsd_of_hopeless_tokens_is_finite_and_bounded(beta: float) -> None:
    student = torch.tensor([[[0.0, -300.0]]], requires_grad=True)
    loss = generalized_jsd(student, torch.tensor([[[-300.0, 0.0]]]), beta=beta)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert loss.item() == pytest.approx(bound, rel=1e-4)
    assert grad.isfinite().all()


@pytest.mark.parametrize("tail", [False, True])
def test_forward_term_is_added_from_the_entropy_threshold_on(tail: bool) -> None:
    student = support(0.1, 0.2).log().expand(1, 3, 2)
    teacher = support(0.5, 0.3).log().expand(1, 3, 2)
    loss = entropy_aware_kl(student, teacher, row(0.79, 0.8, 2.0), entropy_threshold=0.8, tail=tail)
    if tail:
        reverse = truncated_reverse_kl(student, teacher, tail=True)
    else:
        reverse = local_support_matching(student, teacher)
    forward = forward_kl(student, teacher, tail=tail)
    expected = reverse + torch.tensor([[0.0, 1.0, 1.0]]) * forward
    assert torch.allclose(loss, expected, rtol=1e-12)


def test_sampled_surrogate_on_policy_has_gradient_minus_advantage() -> None:
    assert sampled(1.0, 0.7) == pytest.approx((-0.7, -0.7))
    assert sampled(1.0, -0.7) == pytest.approx((0.7, 0.7))


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "grad"),
    [
        (1.5, 2.0, -1.2 * 2.0, 0.0),  # gain clipped
        (0.5, 2.0, -0.5 * 2.0, -0.5 * 2.0),  # a loss of probability is always repaired
        (0.5, -2.0, 0.8 * 2.0, 0.0),  # enough taken away
        (1.5, -2.0, 1.5 * 2.0, 1.5 * 2.0),
        (5.0, -2.0, 3.0 * 2.0, 0.0),  # dual clip
    ],
)
def test_sampled_surrogate_clips_like_ppo(
    ratio: float, advantage: float, value: float, grad: float
) -> None:
    assert sampled(ratio, advantage) == pytest.approx((value, grad))


def test_sampled_surrogate_without_clips_is_ratio_times_advantage() -> None:
    unclipped = {"clip_epsilon": None, "dual_clip": None}
    assert sampled(5.0, -2.0, **unclipped) == pytest.approx((10.0, 10.0))
    assert sampled(5.0, 2.0, **unclipped) == pytest.approx((-10.0, -10.0))


@pytest.mark.parametrize("advantage", [-58.0, 19.0])
@pytest.mark.parametrize("log_ratio", [-500.0, 500.0])
def test_sampled_surrogate_survives_any_ratio(log_ratio: float, advantage: float) -> None:
    behavior = torch.tensor([[-600.0]])
    student = (behavior + log_ratio).requires_grad_()
    loss = sampled_reverse_kl(
        student, behavior, behavior + advantage, clip_epsilon=0.2, dual_clip=3.0
    )
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isfinite().all()
    assert grad.item() == 0.0


def test_weighting_the_loss_is_weighting_the_advantage() -> None:
    for ratio in (0.5, 1.0, 1.5, 5.0):
        for advantage in (-2.0, 2.0):
            value, grad = sampled(ratio, advantage)
            assert sampled(ratio, 1.5 * advantage) == pytest.approx((1.5 * value, 1.5 * grad))


def test_monitor_is_behavior_minus_teacher() -> None:
    monitor = reverse_kl_monitor(row(-0.5, -2.0), row(-1.5, -1.0))
    assert monitor.tolist() == [[1.0, -1.0]]


def test_student_topk_rewards_are_renormalised_behavior_shares() -> None:
    behavior, teacher = support(0.5, 0.2).log(), support(0.3, 0.4).log()
    student = behavior.clone().requires_grad_()
    loss = support_reverse_kl(student, behavior, teacher, clip_epsilon=0.2, dual_clip=3.0)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    rewards = [5 / 7 * math.log(0.3 / 0.5), 2 / 7 * math.log(0.4 / 0.2)]
    assert loss.item() == pytest.approx(-sum(rewards))
    assert grad.flatten().tolist() == pytest.approx([-reward for reward in rewards])


def test_student_topk_clips_each_candidate_by_itself() -> None:
    behavior, teacher = support(0.5, 0.2).log(), support(0.3, 0.4).log()
    student = support(0.5 * 0.5, 0.2 * 1.1).log().requires_grad_()
    loss = support_reverse_kl(student, behavior, teacher, clip_epsilon=0.2, dual_clip=3.0)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    rewards = [5 / 7 * math.log(0.3 / 0.5), 2 / 7 * math.log(0.4 / 0.2)]
    assert loss.item() == pytest.approx(-0.8 * rewards[0] - 1.1 * rewards[1])
    assert grad.flatten().tolist() == pytest.approx([0.0, -1.1 * rewards[1]])


def test_a_fixed_input_with_gradient_is_refused_by_name() -> None:
    unclipped = {"clip_epsilon": None, "dual_clip": None}
    with pytest.raises(ValueError, match="teacher_logprobs_BT must not carry gradient"):
        sampled_reverse_kl(row(-1.0), row(-1.0), row(-1.0, grad=True), **unclipped)
    with pytest.raises(ValueError, match="behavior_logprobs_BT must not carry gradient"):
        reverse_kl_monitor(row(-1.0, grad=True), row(-1.0))
    with pytest.raises(ValueError, match="teacher_logprobs_BTN must not carry gradient"):
        local_support_matching(support(-1.0), support(-1.0, grad=True))
    with pytest.raises(ValueError, match="behavior_logprobs_BTN must not carry gradient"):
        support_reverse_kl(support(-1.0), support(-1.0, grad=True), support(-1.0), **unclipped)


def test_shapes_and_types_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"teacher_logprobs_BTN has shape \(1, 1, 2\)"):
        local_support_matching(support(-1.0), support(-1.0, -2.0))
    with pytest.raises(ValueError, match="teacher_logprobs_BT must be float32 or float64"):
        reverse_kl_monitor(row(-1.0), row(-1.0).half())
    with pytest.raises(ValueError, match="behavior_logprobs_BT must have 2 axes"):
        reverse_kl_monitor(support(-1.0), support(-1.0))
    with pytest.raises(ValueError, match="empty support"):
        truncated_reverse_kl(torch.zeros(1, 1, 0), torch.zeros(1, 1, 0), tail=False)


def test_entropies_must_be_one_number_a_position() -> None:
    chosen = {"tail": False, "entropy_threshold": 0.8}
    with pytest.raises(ValueError, match=r"teacher_entropies_BT has shape \(1, 2\)"):
        entropy_aware_kl(support(-1.0), support(-1.0), row(1.0, 1.0), **chosen)
    with pytest.raises(ValueError, match="teacher_entropies_BT must not carry gradient"):
        entropy_aware_kl(support(-1.0), support(-1.0), row(1.0, grad=True), **chosen)


def test_a_mask_that_is_not_a_mask_is_refused() -> None:
    for mask in (torch.ones(1, 1, 2), torch.ones(1, 1, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"included_BTN must be bool of shape \(1, 1, 2\)"):
            local_support_matching(support(-1.0, -2.0), support(-1.0, -2.0), included_BTN=mask)


@pytest.mark.parametrize("confidence", [2.0, 20.0, 22.0, 24.0, 40.0, 100.0])
def test_a_student_that_is_sure_is_still_pushed_towards_what_is_outside(confidence: float) -> None:
    """1,000 tokens, K 4, .2 of the teacher's mass outside: p - q, whatever the student is sure of.

    Seen with 1 less the mass of the support: .7109 and -.2153 at 20, .5000 and 0 at 22.
    """
    logits_RV = torch.zeros(1, 1000)
    logits_RV[0, :4] = torch.tensor([confidence, 1.0, 1.0, 1.0])
    logits_RV.requires_grad_()
    ids_RK = torch.arange(4).expand(1, 4).contiguous()
    logprobs_RK, _, outside_R = head_logprobs(
        Head(weight_VD=torch.eye(1000).requires_grad_()),
        logits_RV,
        ids_RK,
        support_RN=torch.ones(1, 4, dtype=torch.bool),
    )
    teacher_BTK = torch.tensor([[[0.3, 0.2, 0.2, 0.1]]]).log()
    loss_BT = forward_kl(
        logprobs_RK.unsqueeze(0), teacher_BTK, student_log_outside_BT=outside_R.unsqueeze(0)
    )
    loss_BT.sum().backward()
    assert logits_RV.grad is not None
    p_V = logits_RV.detach().double().softmax(-1)[0]
    q_outside = 0.2 * p_V[4:] / p_V[4:].sum()
    exact_V = p_V - torch.cat([torch.tensor([0.3, 0.2, 0.2, 0.1]).double(), q_outside])
    assert torch.allclose(logits_RV.grad[0].double(), exact_V, rtol=1e-4, atol=1e-9)


def test_the_released_entropy_aware_objective() -> None:
    """Clipped sampled-token reverse KL on every token, and coefficient times the forward KL of the
    teacher renormalised on its list, where its entropy reaches the threshold."""
    made = case(3)
    loss = EntropyAwareKL(reverse="sampled", coefficient=0.7, entropy_threshold=1.5)
    inputs = made.inputs()
    assert inputs.teacher_topk is not None
    assert inputs.teacher_entropies_BT is not None
    unsure_BT = inputs.teacher_entropies_BT >= 1.5
    assert unsure_BT.any()
    assert not unsure_BT.all()
    forward_BT = forward_kl(
        inputs.teacher_topk.student_logprobs_BTN,
        inputs.teacher_topk.teacher_logprobs_BTN,
        tail=False,
    )
    expected = SampledReverseKL()(inputs) + 0.7 * torch.where(unsure_BT, forward_BT, 0.0)
    assert torch.allclose(loss(inputs), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", [1e-12, 1e-6, 9e-4, 1 - 1e-6])
def test_a_mixture_that_would_learn_nothing_is_refused(beta: float) -> None:
    remedy = "forward_kl" if beta < 0.5 else "truncated_reverse_kl"
    with pytest.raises(ValueError, match=rf"beta is .*from 0.001 to 0.999.*{remedy}"):
        GeneralizedJSD(beta=beta)
