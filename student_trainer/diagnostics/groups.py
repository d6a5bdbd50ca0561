"""Which figures belong together: sections of docs/diagnostics.md, and what trackers group by."""

from __future__ import annotations

GROUPS = {
    "agreement": (
        "overlap bad_event_rate reverse_kl reverse_kl_first_third reverse_kl_middle_third "
        "reverse_kl_last_third abs_advantage_per_response behavior_entropy "
        "student_mass_at_teacher_topk teacher_mass_at_teacher_topk behavior_mass_at_student_topk "
        "teacher_mass_at_student_topk mismatched_token_ids"
    ),
    "length": (
        "length_mean length_p90 effective_length_mean effective_length_p50 effective_length_p90 "
        "max_tokens budget_hit_share repetition_rate repetition_rate_p90"
    ),
    "ending": (
        "truncated_rollouts truncation_rate exhausted_rate unreliable_share ended_by_student "
        "ended_by_length unscored_rollouts partly_scored_rollouts overshoot_tokens overshoot_mean "
        "overshoot_bound_mean"
    ),
    "update": (
        "loss loss_tokens grad_norm learning_rate updates lost_in_rounding weight_mean weight_min "
        "weight_max sync_gap_nats staleness_min_version"
    ),
    "cost": (
        "rollouts generated_tokens kept_tokens generation_span_s seconds_generate "
        "seconds_teacher_wait seconds_learn seconds_sync"
    ),
    "eval": "accuracy mean_tokens ungraded",
}
"""Names of the scalars of a step or an evaluation; `eval` has those of k samples too, and held-out
ones a group of their own."""
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}
HELDOUT, EVAL, OTHER = "heldout", "eval", "other"


def group_of(name: str) -> str:
    """The group of a scalar as metrics.jsonl calls it."""
    if name in GROUP_OF:
        return GROUP_OF[name]
    if name.startswith(f"{HELDOUT}_"):
        return HELDOUT
    return EVAL if name.startswith(("avg_at_", "pass_at_")) else OTHER
