"""The figures of an evaluation by which one checkpoint is better than another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from student_trainer.settings.data import DataSettings
    from student_trainer.settings.evaluation import EvalSettings
    from student_trainer.settings.run import CheckpointSettings

HIGHER_IS_BETTER = {
    "heldout_reverse_kl": False,
    "heldout_sampled_reverse_kl": False,
    "heldout_forward_kl": False,
    "heldout_teacher_logprob": True,
    "heldout_overlap": True,
    "heldout_end_rate": True,
    "heldout_repetition_rate": False,
    "accuracy": True,
    "ungraded": False,
    "avg_at_K": True,
    "pass_at_K": True,
}
"""By name in metrics.jsonl, with a number for K. Of the others (lengths, counts, masses, entropies,
standard errors) neither more nor less is better."""
HELDOUT = "heldout_"


def check_metric(name: str) -> str:
    """Raises ValueError, with the known ones, for a figure that says nothing of what is better."""
    if _kind(name) not in HIGHER_IS_BETTER or name in ("avg_at_K", "pass_at_K"):
        raise ValueError(
            f"{name!r} is no figure of an evaluation that is known to be better higher or lower: "
            f"one of {', '.join(HIGHER_IS_BETTER)} (a number for K)"
        )
    return name


def higher_is_better(name: str) -> bool:
    """The direction of a known figure."""
    return HIGHER_IS_BETTER[_kind(name)]


def why_no_best(
    checkpoint: CheckpointSettings, data: DataSettings, evaluation: EvalSettings
) -> str | None:
    """Why no checkpoint of a run is ever the best; None where one may be, or none is asked for."""
    best, metric = checkpoint.keep_best, checkpoint.best_metric
    why: str | None = "without data.heldout nothing is evaluated"
    if data.heldout is not None:
        why = _why_absent(metric, evaluation.pass_k, evaluation.teacher_samples)
    if not best or why is None:
        return None
    return f"checkpoint.keep_best is {best} by checkpoint.best_metric {metric}: {why}"


def _why_absent(name: str, pass_k: Sequence[int], teacher_samples: int) -> str | None:
    if name.startswith(HELDOUT) and teacher_samples == 0:
        return "it is the teacher's, and eval.teacher_samples is 0"
    kind, k = _kind(name), name.rpartition("_")[2]
    drawn = {"pass_at_K": [*pass_k], "avg_at_K": [max(pass_k, default=0)]}.get(kind)
    if drawn is not None and int(k) not in drawn:
        return f"eval.pass_k is {list(pass_k)}"
    return None


def is_of_samples(name: str) -> bool:
    """Whether it is in the first and the last evaluation alone."""
    return _kind(name) in ("avg_at_K", "pass_at_K")


def _kind(name: str) -> str:
    return re.sub(r"(?<=_at)_\d+$", "_K", name)
